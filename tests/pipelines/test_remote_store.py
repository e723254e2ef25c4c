"""Extraction into a bucket and training from it: the same features, the same head."""

from __future__ import annotations

import numpy as np
import pytest

import featstore
from featstore.errors import StorageError
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig
from featstore.pipelines.reading import BucketConfig
from featstore.pipelines.train_head import TrainHeadConfig, train_head
from featstore.store import remote_connection
from featstore.store.verify import verify
from tests.store.s3_server import Fault


def config(labelled, store, **options):
    return ExtractConfig(
        dataset=f"folder:{labelled}", techniques="basic", store=store, model="reference", device="cpu", **options
    )


def counts(report):
    (run,) = report.to_json()["runs"]
    return run["computed"], run["reused"]


def trained(labelled, store):
    bucket = BucketConfig(dataset=f"folder:{labelled}", techniques="basic", store=store)
    report = train_head(TrainHeadConfig(bucket=bucket, ensemble=1, splits=1, max_steps=50, device="cpu"))
    return report.metrics["miou"].mean


def test_extract_and_train(labelled, tiny, s3, tmp_path):
    local = str(tmp_path / "local.zarr")
    for store in (local, s3.url):
        assert counts(extract(config(labelled, store, batch_size=4))) == (8, 0)
    assert counts(extract(config(labelled, s3.url))) == (0, 8)
    here, there = (featstore.open(store).dataset("discs").run("basic") for store in (local, s3.url))
    for layer in here.layers:
        assert np.array_equal(here.numpy(layer, range(8)), there.numpy(layer, range(8)))
    assert verify(featstore.open(s3.url)).ok
    assert trained(labelled, s3.url) == trained(labelled, local)


def test_an_extraction_that_is_cut_off_goes_on(labelled, tiny, s3, monkeypatch):
    """The server takes no more records at some time: what is committed stays, and the same command goes on."""
    monkeypatch.setenv("FEATSTORE_REMOTE_RETRY_SECONDS", "0.5")
    monkeypatch.setattr(remote_connection, "_BACKOFF_SECONDS", 0.01)
    outage, taken = Fault(times=10**6, status=503), []

    def choose(request):
        if request.method != "PUT" or "/committed/" not in request.path or "/c." not in request.path:
            return None
        taken.append(request)
        return outage if len(taken) > 2 else None

    s3.proxy.choose = choose
    with pytest.raises(StorageError, match=r"503 .*attempts") as caught:
        extract(config(labelled, s3.url, batch_size=4))
    assert "run the same command again" in caught.value.hint
    s3.proxy.reset()
    run = featstore.open(s3.url).dataset("discs").run("basic")
    there = [layer for layer in run.layers if run.valid([layer]).all()]
    assert 0 < len(there) < len(run.layers)
    before = {layer: run.numpy(layer, range(8)) for layer in there}
    extract(config(labelled, s3.url, batch_size=4))
    run = featstore.open(s3.url).dataset("discs").run("basic")
    assert all(np.array_equal(run.numpy(layer, range(8)), before[layer]) for layer in there)
    assert verify(featstore.open(s3.url)).ok

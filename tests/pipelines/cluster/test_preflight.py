"""What workers lack is found before the first block, each fault caused for real."""

from __future__ import annotations

import shutil

import pytest
from distributed import Client

from featstore.errors import BadRequestError, IncompatibleError, NotFoundError, StorageError
from featstore.pipelines.cluster.config import ClusterConfig
from featstore.pipelines.extract import extract
from tests.pipelines.cluster.test_extract import IMAGES, Told, on

OWN_FOLDER = "/proc/self/cwd"
"""A path that is another folder in each process: what a local path is on each machine of a cluster."""


@pytest.fixture
def elsewhere(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


def refused(config, cluster, kind, *words):
    with pytest.raises(kind) as caught:
        extract(config, cluster=cluster)
    error = caught.value
    assert error.exit_code == 2
    assert "\n" not in str(error)
    for word in words:
        assert word in f"{error} {error.hint}"
    return error


def test_a_scheduler_out_of_reach(config):
    nowhere = ClusterConfig(scheduler="tcp://127.0.0.1:1", connect_seconds=1)
    refused(config(), nowhere, StorageError, "tcp://127.0.0.1:1", "cannot be reached", "dask scheduler")


def test_a_scheduler_without_workers(empty_cluster, config):
    patient = on(empty_cluster, worker_seconds=1)
    refused(config(), patient, StorageError, "has no workers", f"dask worker {empty_cluster.address}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers": -1}, "--workers -1"),
        ({"workers": 9999}, "--workers 9999"),
        ({"workers": 2, "scheduler": "tcp://h:1"}, "both given"),
        ({"scheduler": "host"}, "tcp://10.0.0.1:8786"),
        ({"workers": 1, "tries": 0}, "0 tries"),
    ],
)
def test_requests_that_cannot_be(changes, words):
    with pytest.raises(BadRequestError) as caught:
        ClusterConfig(**changes)
    assert words in f"{caught.value} {caught.value.hint}"


def test_a_store_in_this_process(config):
    refused(config(store="memory://here"), ClusterConfig(workers=1), BadRequestError, "memory://here", "s3://")


def test_another_version_of_a_package(empty_cluster, config, elsewhere, tiny):
    folder = elsewhere / "zarr-0.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: zarr\nVersion: 0.1\n")
    empty_cluster.start_workers(1, PYTHONPATH=str(elsewhere))
    refused(
        config(), on(empty_cluster), IncompatibleError, "worker at tcp://", "zarr 0.1; this process has", "versions"
    )


def test_a_store_that_workers_do_not_see(cluster, config, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = f"{OWN_FOLDER}/features.zarr"
    error = refused(config(store=url), on(cluster), NotFoundError, "workers at tcp://", "do not see store", "s3://")
    assert url in str(error)
    assert not (cluster.folder / "features.zarr").exists()


def test_weights_that_are_absent_or_others(empty_cluster, config, elsewhere, weights_root, tiny):
    copy = elsewhere / "weights"
    shutil.copytree(weights_root, copy)
    weights = next((copy / "reference" / "pipeline" / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    nanny = empty_cluster.start_workers(1, FEATSTORE_WEIGHTS=str(copy))
    refused(config(), on(empty_cluster), IncompatibleError, "weights of model 'reference'", "others than those here")
    empty_cluster.stop_workers()
    assert nanny.poll() is not None
    nothing = elsewhere / "nothing"
    nothing.mkdir()
    shutil.copytree(weights_root / "reference", nothing / "reference", ignore=shutil.ignore_patterns("*.safetensors"))
    empty_cluster.start_workers(1, FEATSTORE_WEIGHTS=str(nothing))
    refused(config(), on(empty_cluster), NotFoundError, "worker at tcp://", "weights:")


def test_a_lora_that_is_another_one(empty_cluster, config, elsewhere, weights_root, tiny, monkeypatch):
    monkeypatch.chdir(elsewhere)
    own = weights_root / "reference" / "lora" / "pytorch_lora_weights.safetensors"
    shutil.copy(own, elsewhere / "horse.safetensors")
    there = empty_cluster.folder / "horse.safetensors"
    content = bytearray(own.read_bytes())
    content[-1] ^= 1
    there.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.chdir(empty_cluster.folder)
        empty_cluster.start_workers(1, FEATSTORE_WEIGHTS=str(weights_root))
    wanted = config(techniques=f"lora:{OWN_FOLDER}/horse.safetensors")
    refused(wanted, on(empty_cluster), IncompatibleError, "what steers", "copy the same files")


def test_images_that_are_absent_or_others(cluster, config, photos, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(photos.parent)
    wanted = config(dataset=f"folder:{OWN_FOLDER}/photos")
    refused(wanted, on(cluster), NotFoundError, "there is no such file", "share")


def test_a_device_that_workers_lack(cluster, config, tiny):
    refused(config(device="cuda:7"), on(cluster), BadRequestError, "worker at tcp://", "cuda:7")


def test_a_worker_that_comes_later_and_lacks_something_gets_no_blocks(
    empty_cluster, wanted, elsewhere, weights_root, tmp_path
):
    empty_cluster.start_workers(1, FEATSTORE_WEIGHTS=str(weights_root))

    class Late(Told):
        def start(self, title, total, unit):
            empty_cluster.start_workers(1, FEATSTORE_WEIGHTS=str(elsewhere))
            with Client(empty_cluster.address, set_as_default=False) as client:
                client.wait_for_workers(2, timeout=60)

    told = Late()
    report = extract(wanted(tmp_path / "s.zarr"), told, cluster=on(empty_cluster))
    assert report.failed == {}
    assert report.passes == 2 * IMAGES
    assert len(report.workers) == 1
    (refusal,) = [note for note in told.notes if "gets no blocks" in note]
    assert "others than those here" in refusal

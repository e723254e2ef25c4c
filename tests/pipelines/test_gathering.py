"""`train-head --pixels-per-image`, alone and on a cluster: the same head, and errors before anything is read."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from featstore.errors import BadRequestError, StorageError
from featstore.heads.sampled import Gathering
from featstore.pipelines import gathering as gathering_module
from featstore.pipelines.cluster.config import ClusterConfig
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig
from featstore.pipelines.reading import BucketConfig
from featstore.pipelines.train_head import TrainHeadConfig, train_head
from tests.pipelines.cluster.processes import processes


@pytest.fixture(scope="module")
def store(weights_root, tmp_path_factory):
    place = tmp_path_factory.mktemp("gathering") / "s.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATSTORE_WEIGHTS", str(weights_root))
        extract(ExtractConfig(dataset="toyhorse", techniques="basic,prompt", store=str(place), device="cpu"))
    return place


def wanted(store, out, **changes):
    return TrainHeadConfig(
        **{
            "bucket": BucketConfig(dataset="toyhorse", techniques="basic,prompt", store=str(store)),
            "ensemble": 2,
            "splits": 1,
            "max_steps": 20,
            "device": "cpu",
            "out": out,
            "pixels_per_image": 50,
            **changes,
        }
    )


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def test_a_cluster_gives_the_same_head(store, tmp_path):
    alone = train_head(wanted(store, tmp_path / "alone"))
    with processes(tmp_path) as cluster:
        cluster.start_workers(2)
        there = train_head(wanted(store, tmp_path / "there", cluster=ClusterConfig(scheduler=cluster.address)))
    local = train_head(wanted(store, tmp_path / "local", cluster=ClusterConfig(workers=2)))
    assert bytes_of(tmp_path / "alone")
    assert bytes_of(tmp_path / "alone") == bytes_of(tmp_path / "there") == bytes_of(tmp_path / "local")
    assert alone.metrics == there.metrics == local.metrics


def test_small_pieces_give_the_same_head(store, tmp_path, monkeypatch):
    train_head(wanted(store, tmp_path / "one"))
    monkeypatch.setattr(gathering_module, "_TASK_BYTES", 1)
    train_head(wanted(store, tmp_path / "other"))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "other")


def test_pieces_cover_every_image_that_has_pixels_and_no_more_than_a_block():
    rows = [0, 1, 4, 5, 6, 7, 9, 30]
    pixels = [np.arange(count) for count in (3, 0, 2, 2, 2, 2, 1, 5)]
    found = list(gathering_module._pieces(rows, pixels, 8, gathering_module._TASK_BYTES // 5))
    assert [(one.first, one.rows) for one in found] == [(0, (0, 4)), (5, (5, 6)), (9, (7,)), (11, (9,)), (12, (30,))]
    assert [sum(map(len, one.pixels)) for one in found] == [5, 4, 2, 1, 5]


def test_workers_that_do_not_see_the_store_are_named(store, tmp_path, monkeypatch):
    there = tmp_path / "moved.zarr"
    shutil.copytree(store, there)
    genuine = gathering_module._there

    def hidden(*args):
        # Gone for workers and read already by this process, which holds what it needs for the plan.
        there.rename(tmp_path / "hidden.zarr")
        yield from genuine(*args)

    monkeypatch.setattr(gathering_module, "_there", hidden)
    with pytest.raises(StorageError, match="1 of 1 workers cannot read the store") as caught:
        train_head(wanted(there, None, cluster=ClusterConfig(workers=1)))
    assert "s3://" in caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixels_per_image": 0}, "0 pixels of an image"),
        ({"head": "upernet"}, "is for the 'pixel' head"),
        ({"task": "classification"}, "is for the 'pixel' head"),
        ({"pixels_per_image": None, "cluster": ClusterConfig(workers=2)}, "none to gather"),
        (
            {
                "cluster": ClusterConfig(workers=2),
                "bucket": BucketConfig(dataset="toyhorse", techniques="basic", store="memory://x"),
            },
            "memory of this process",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(store, changes, message):
    with pytest.raises(BadRequestError, match=message):
        wanted(store, None, **changes)


def test_vectors_that_do_not_fit_into_memory_are_refused_before_anything_is_read(store, monkeypatch):
    monkeypatch.setattr(Gathering, "pixel_bytes", property(lambda _: 10**12))
    monkeypatch.setattr(Gathering, "__call__", lambda *_: pytest.fail("read"))
    with pytest.raises(BadRequestError, match="GB of memory are free") as caught:
        train_head(wanted(store, None))
    assert "--pixels-per-image" in caught.value.hint


def test_an_unreachable_scheduler_is_said_as_in_extract(store):
    config = ClusterConfig(scheduler="tcp://127.0.0.1:9", connect_seconds=1)
    with pytest.raises(StorageError, match="cannot be reached"):
        train_head(wanted(store, None, cluster=config))

"""Extraction on a cluster of separate processes ends with the bytes of a single one."""

from __future__ import annotations

import random
import shutil
import threading
import time

import pytest
import torch
from PIL import Image

import featstore
import featstore.pipelines.extract
from featstore.pipelines.cluster.config import ClusterConfig
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig, make_plan
from featstore.pipelines.progress import Silent
from featstore.store import leases
from featstore.store.verify import verify
from featstore.techniques import SteeringOptions
from tests.pipelines import killing

IMAGES = 200


class Told(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def on(cluster, **changes):
    return ClusterConfig(**{"scheduler": cluster.address, **changes})


def begun(config):
    """A run's batch size and threads are those of who creates it: this process, so that bytes can be compared."""
    extract(config)
    return config


def test_the_bytes_are_those_of_one_process(cluster, many, wanted, tmp_path):
    alone, there = tmp_path / "alone.zarr", tmp_path / "there.zarr"
    extract(wanted(alone))
    begun(wanted(there, limit=1))
    told = Told()
    report = extract(wanted(there), told, cluster=on(cluster)).to_json()
    assert told.notes == []
    assert [run["computed"] for run in report["runs"]] == [IMAGES - 1, IMAGES - 1]
    assert killing.arrays(there) == killing.arrays(alone)
    assert verify(featstore.open(str(there))).ok
    assert sum(worker["passes"] for worker in report["workers"]) == 2 * (IMAGES - 1)
    assert all(worker["peak_rss_bytes"] > 0 for worker in report["workers"])
    for run in featstore.open(str(there)).dataset(many.name).runs():
        assert leases.held(run.dataset.objects, run.path) == []
    objects = featstore.open(str(there)).objects
    assert objects.names(".featstore/preflight") == []
    again = extract(wanted(there), cluster=on(cluster)).to_json()
    assert [run["computed"] for run in again["runs"]] == [0, 0]
    assert "workers" not in again


def test_new_runs_get_the_threads_of_the_workers_machine(cluster, wanted, tmp_path):
    report = extract(wanted(tmp_path / "s.zarr", limit=3), cluster=on(cluster))
    made_by = report.outcomes[0].run.provenance[0]
    assert made_by["cpu_threads"] >= 1
    assert made_by["device"] == "cpu"
    assert report.outcomes[0].run.batch_size == 8


def test_techniques_with_texts_and_reductions(cluster, wanted, tmp_path, photos, lora):
    captions = tmp_path / "captions.json"
    captions.write_text(
        "{" + ", ".join(f'"{path.name}": "picture {path.stem}"' for path in sorted(photos.iterdir())) + "}"
    )
    changes = {
        "dataset": f"folder:{photos}",
        "techniques": f"{lora}+controlnet,cfg+prompt:caption",
        "steering": SteeringOptions(captions=captions),
        "reduce": "pca:4",
        "precision": "int8",
    }
    alone, there = tmp_path / "alone.zarr", tmp_path / "there.zarr"
    report = extract(wanted(there, **changes), cluster=on(cluster))
    assert report.passes == 2 * 10
    before = torch.get_num_threads()
    torch.set_num_threads(report.outcomes[0].run.provenance[0]["cpu_threads"])
    extract(wanted(alone, **changes))
    torch.set_num_threads(before)
    assert killing.arrays(there) == killing.arrays(alone)
    assert verify(featstore.open(str(there))).ok


def test_toyhorse_with_its_own_captions(cluster, tmp_path, tiny):
    wanted = ExtractConfig(
        dataset="toyhorse", techniques="prompt:caption,lora", store=str(tmp_path / "s"), limit=5, device="cpu"
    )
    assert extract(wanted, cluster=on(cluster)).passes == 10


def test_images_that_are_no_longer_what_they_were_fail_with_the_reason(cluster, wanted, tmp_path, many, monkeypatch):
    folder = tmp_path / "few"
    folder.mkdir()
    for name in ("000.png", "001.png", "002.png", "003.png", "004.png"):
        shutil.copy(many / name, folder / name)
    config = wanted(tmp_path / "s.zarr", dataset=f"folder:{folder}")
    genuine = make_plan

    def changed_meanwhile(*args, **options):
        plan = genuine(*args, **options)
        Image.new("RGB", (64, 64)).save(folder / "001.png")
        (folder / "003.png").write_bytes(b"")
        return plan

    monkeypatch.setattr(featstore.pipelines.extract, "make_plan", changed_meanwhile)
    report = extract(config, cluster=on(cluster))
    assert set(report.failed) == {"001.png", "003.png"}
    assert all("not those that were listed" in reason for reason in report.failed.values())


def test_a_block_that_another_extraction_holds_is_waited_for(cluster, wanted, tmp_path, many, monkeypatch):
    store = tmp_path / "shared.zarr"
    begun(wanted(store, limit=1))
    run = featstore.open(str(store)).dataset(many.name).run("basic")
    with monkeypatch.context() as patch:
        patch.setattr(leases.partial, "place", lambda: "0" * 12)
        patch.setattr(leases, "TTL_SECONDS", 6.0)
        lease = leases.acquire(featstore.store.create(str(store)).objects, run.path, 1)
        assert isinstance(lease, leases.Lease)
    told = Told()
    report = extract(wanted(store), told, cluster=on(cluster)).to_json()
    assert [run["computed"] for run in report["runs"]] == [IMAGES - 1, IMAGES - 1]
    assert any("waiting for" in note for note in told.notes)
    assert verify(featstore.open(str(store))).ok


def test_a_store_in_a_bucket(empty_cluster, wanted, tmp_path, weights_root, s3, monkeypatch):
    monkeypatch.setenv("FEATSTORE_REMOTE_TIMEOUT_SECONDS", "60")
    empty_cluster.start_workers(2, FEATSTORE_WEIGHTS=str(weights_root))
    begun(wanted(s3.url, limit=1))
    report = extract(wanted(s3.url), cluster=on(empty_cluster))
    assert report.passes == 2 * (IMAGES - 1)
    there = featstore.open(s3.url)
    assert verify(there).ok
    extract(wanted(tmp_path / "alone.zarr"))
    alone = featstore.open(str(tmp_path / "alone.zarr"))
    for technique in ("basic", "controlnet"):
        runs = [store.dataset(store.datasets()[0]).run(technique) for store in (there, alone)]
        for layer in runs[0].layers:
            both = [run.numpy(layer, range(IMAGES)) for run in runs]
            assert both[0].tobytes() == both[1].tobytes()


def kill_at_random(cluster, shuffle, kills, between, over):
    """SIGKILL workers until ``kills`` have died or ``over`` is set; returns how many did."""
    killed = 0
    while killed < kills and not over.wait(shuffle.uniform(*between)):
        killed += cluster.kill_one(shuffle)
    return killed


def ends_the_same(cluster, folder, alone, wanted, shuffle, kills, between):
    there = folder / "there.zarr"
    begun(wanted(there, limit=1))
    over, killed = threading.Event(), []
    killer = threading.Thread(target=lambda: killed.append(kill_at_random(cluster, shuffle, kills, between, over)))
    killer.start()
    try:
        report = extract(wanted(there), cluster=on(cluster, tries=30))
    finally:
        over.set()
        killer.join()
    assert report.failed == {}
    assert killing.arrays(there) == killing.arrays(alone)
    assert verify(featstore.open(str(there))).ok
    assert make_plan(wanted(there)).passes_todo == 0
    return killed[0]


def toyhorse(store, **changes):
    values = {"dataset": "toyhorse", "techniques": "prompt,controlnet", "store": str(store), "device": "cpu"}
    return ExtractConfig(**(values | changes))


def test_workers_killed_at_random(empty_cluster, tmp_path, told):
    """The embedded model and data set; a worker dies now and then in the middle of its block."""
    empty_cluster.start_workers(2)
    extract(toyhorse(tmp_path / "alone.zarr"))
    killed = ends_the_same(empty_cluster, tmp_path, tmp_path / "alone.zarr", toyhorse, random.Random(0), 3, (3.0, 6.0))
    told(f"{killed} workers killed")
    assert killed >= 1


@pytest.mark.full
def test_thirty_workers_killed_at_random(empty_cluster, tmp_path, told):
    empty_cluster.start_workers(3)
    extract(toyhorse(tmp_path / "alone.zarr"))
    shuffle, killed, stores = random.Random(1), 0, 0
    while killed < 30:
        folder = tmp_path / str(stores)
        folder.mkdir()
        killed += ends_the_same(empty_cluster, folder, tmp_path / "alone.zarr", toyhorse, shuffle, 8, (0.5, 6.0))
        stores += 1
        time.sleep(1)
    told(f"{killed} workers killed, {stores} stores with equal bytes")

"""Poisoned blocks, clients that die or are interrupted, and local workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import Client

import featstore
from featstore.errors import StorageError
from featstore.pipelines.extract import extract
from featstore.store.run_logs import log_entries
from featstore.store.verify import verify
from tests.pipelines import killing
from tests.pipelines.cluster import full_disk, poison
from tests.pipelines.cluster.processes import processes
from tests.pipelines.cluster.test_extract import IMAGES, on

# A test run that was itself started in the background has SIGINT ignored, and its children inherit that.
_MAIN = """
import signal
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from featstore.cli import main
    main()
"""
WORDS = ("extract", "--dataset", "toyhorse", "--techniques", "prompt,controlnet", "--device", "cpu", "--json")


@pytest.fixture
def command(tmp_path):
    """Starts `featstore` in a process group of its own."""
    script = tmp_path / "main.py"
    script.write_text(_MAIN)

    def start(*words):
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ,
            text=True,
            start_new_session=True,
        )

    return start


def committed(store: Path) -> int:
    return len([path for path in store.rglob("committed/*/c.*") if path.is_file()])


def once_something_is_committed(process, store: Path) -> None:
    deadline = time.monotonic() + 240
    while not committed(store):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finished(process) -> dict:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return json.loads(out)


def test_a_block_that_kills_its_workers_is_given_up_and_the_rest_goes_on(
    wanted, weights_root, tmp_path, tmp_path_factory
):
    store = tmp_path / "s.zarr"
    folder = tmp_path_factory.mktemp("cluster")
    with processes(folder) as cluster:
        preload = {"DASK_DISTRIBUTED__WORKER__PRELOAD": poison.__file__, "FEATSTORE_WEIGHTS": str(weights_root)}
        cluster.start_workers(2, **preload)
        report = extract(wanted(store), cluster=on(cluster))
    poisoned = [f"{number:03d}.png" for number in range(128, 192)]
    assert sorted(report.failed) == poisoned
    assert poison.KEY in report.failed
    assert all("failed 3 times: its worker died" in reason for reason in report.failed.values())
    for run in report.to_json()["runs"]:
        # What died after its commit is found there when it is tried again.
        assert run["computed"] + run["reused"] == IMAGES - 64
    again = extract(wanted(store)).to_json()
    assert [run["computed"] for run in again["runs"]] == [64, 64]
    assert verify(featstore.open(str(store))).ok


def test_a_worker_that_cannot_write_costs_tries_and_nothing_else(wanted, weights_root, tmp_path, tmp_path_factory):
    store = tmp_path / "s.zarr"
    with processes(tmp_path_factory.mktemp("cluster")) as cluster:
        environment = {"FEATSTORE_WEIGHTS": str(weights_root)}
        cluster.start_workers(1, DASK_DISTRIBUTED__WORKER__PRELOAD=full_disk.__file__, **environment)
        cluster.start_workers(1, **environment)
        with Client(cluster.address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=120)
        report = extract(wanted(store), cluster=on(cluster))
    assert report.failed == {}
    assert [run["computed"] for run in report.to_json()["runs"]] == [IMAGES, IMAGES]
    (log,) = log_entries(featstore.open(str(store)).objects, limit=5)
    assert log.facts["retries"] >= 1
    assert verify(featstore.open(str(store))).ok


def test_a_store_that_nobody_can_write_ends_it_and_not_every_image(wanted, weights_root, tmp_path, tmp_path_factory):
    store = tmp_path / "s.zarr"
    with processes(tmp_path_factory.mktemp("cluster")) as cluster:
        environment = {"FEATSTORE_WEIGHTS": str(weights_root)}
        cluster.start_workers(2, DASK_DISTRIBUTED__WORKER__PRELOAD=full_disk.__file__, **environment)
        with pytest.raises(
            StorageError, match=r"3 blocks one after the other failed 3 times each.*No space left"
        ) as caught:
            extract(wanted(store), cluster=on(cluster))
    assert "same command again" in caught.value.hint
    assert committed(store) == 0
    (log,) = log_entries(featstore.open(str(store)).objects, limit=5)
    assert log.state == "failed"
    assert [run["computed"] for run in extract(wanted(store)).to_json()["runs"]] == [IMAGES, IMAGES]


def test_a_client_that_is_killed_and_comes_back(cluster, command, tmp_path, weights_root, tiny):
    store = tmp_path / "s.zarr"
    words = (*WORDS, "--batch-size", "8", "--store", store, "--scheduler", cluster.address)
    process = command(*words)
    once_something_is_committed(process, store)
    process.kill()
    process.communicate()
    report = finished(command(*words))
    assert all(run["computed"] + run["reused"] == 160 and not run["failed"] for run in report["runs"])
    assert verify(featstore.open(str(store))).ok


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_an_interruption_commits_what_is_under_way(command, tmp_path, tiny, number):
    store = tmp_path / "s.zarr"
    words = (*WORDS, "--timesteps", "10,20,30,40,50,60,70,80", "--store", store, "--workers", "2")
    process = command(*words)
    once_something_is_committed(process, store)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert '"KeyboardInterrupt"' in out
    assert "blocks under way are ended" in err
    assert "Traceback" not in err
    assert verify(featstore.open(str(store))).ok
    left = finished(command(*words))
    assert sum(run["reused"] for run in left["runs"]) > 0
    assert all(run["computed"] + run["reused"] == 160 for run in left["runs"])


def test_each_worker_of_a_machine_with_gpus_sees_one():
    """Without GPUs: what is checked is what the processes are told."""
    from featstore.pipelines.cluster import connect

    with (
        connect._one_for_each(["3", "5"], connect._common(2)) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        seen = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
        assert sorted(seen.values()) == ["3", "5"]
        assert set(client.nthreads().values()) == {connect.WORKER_THREADS}


def test_local_workers_by_the_command_line(command, tmp_path, tiny):
    store, alone = tmp_path / "s.zarr", tmp_path / "alone.zarr"
    finished(command(*WORDS, "--limit", "1", "--store", store))
    report = finished(command(*WORDS, "--store", store, "--workers", "2"))
    finished(command(*WORDS, "--store", alone))
    assert sum(worker["passes"] for worker in report["workers"]) == 2 * 159
    assert {"name", "passes", "passes_per_second", "peak_rss_bytes"} <= report["workers"][0].keys()
    assert killing.arrays(store) == killing.arrays(alone)
    assert "workers" not in finished(command(*WORDS, "--store", store, "--workers", "2"))

"""Several threads and processes on one store at once."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import featstore.store as fs
from featstore.errors import NotCommittedError
from featstore.store.local import LocalObjects


def test_threads_write_different_blocks_and_runs_and_the_same_block(tmp_path, lab):
    n = 200
    runs = [lab.start(tmp_path / "s", n, timestep=t)[1] for t in (0, 50)]
    # Every third row of each block in a call of its own: the same shard is merged from several threads.
    jobs = [
        (run, block, [row for row in run.block_rows(block) if row % 3 == part])
        for run in runs
        for block in range(run.n_blocks)
        for part in range(3)
    ]
    maps = [{layer: lab.maps_of(run, rows, layer) for layer in lab.LAYERS} for run, _, rows in jobs]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda job, m: job[0].write_block(job[1], job[2], m), jobs, maps))
    fs.create(tmp_path / "s").finish(runs)
    for run in runs:
        assert run.valid(list(lab.LAYERS)).all()
    lab.full(tmp_path / "want", n, timestep=0)
    lab.full(tmp_path / "want", n, timestep=50)
    assert lab.files(tmp_path / "s") == lab.files(tmp_path / "want")


def test_processes_write_rows_of_the_same_blocks(tmp_path, lab, workers):
    n = 130
    _, run = lab.start(tmp_path / "s", n)
    mine = [row for row in range(n) if row % 2]
    workers.start(url=tmp_path / "s", n=n, piece=4, rows=[row for row in range(n) if row % 2 == 0])
    lab.fill(run, piece=4, rows=mine)
    assert workers.wait()[0]["error"] is None
    assert run.valid(list(lab.LAYERS)).all()
    fs.create(tmp_path / "s").finish()
    lab.full(tmp_path / "want", n)
    assert lab.files(tmp_path / "s") == lab.files(tmp_path / "want")


def test_processes_write_the_very_same_rows(tmp_path, lab, workers):
    _, run = lab.start(tmp_path / "s", 130)
    workers.start(url=tmp_path / "s", n=130, piece=3)
    lab.fill(run, piece=3)
    assert workers.wait()[0]["error"] is None
    fs.create(tmp_path / "s").finish()
    lab.full(tmp_path / "want", 130)
    assert lab.files(tmp_path / "s") == lab.files(tmp_path / "want")


def test_a_reader_while_a_writer_rewrites(tmp_path, lab):
    """A reader sees rows as its table has them, or is refused; never another image's features."""
    n = 64
    lab.full(tmp_path / "s", n)
    reader = fs.open(tmp_path / "s").dataset("toy").runs()[0]
    want = {layer: lab.maps_of(reader, range(n), layer) for layer in lab.LAYERS}
    stop = threading.Event()
    counts = {"read": 0, "refused": 0}

    def read():
        rng = np.random.default_rng(0)
        while not stop.is_set():
            rows = rng.choice(n, 4, replace=False)
            for layer, values in want.items():
                try:
                    got = reader.numpy(layer, rows)
                except NotCommittedError:
                    counts["refused"] += 1
                else:
                    np.testing.assert_array_equal(got, values[rows])
                    counts["read"] += 1

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(read) for _ in range(2)]
        for turn in range(20):
            _, run = lab.start(tmp_path / "s", n, changed=range(8) if turn % 2 else ())
            lab.fill(run, piece=4)
        stop.set()
        for future in futures:
            future.result()
    assert counts["read"] > 20
    assert counts["refused"] > 0


def test_a_shard_replaced_between_the_record_and_the_read_is_refused(tmp_path, lab):
    """The worst moment, caused: the record was read, then a writer replaces the row, then the shard is opened."""
    lab.full(tmp_path / "s", 10)
    reader = fs.open(tmp_path / "s").dataset("toy").runs()[0].reader("up1")
    want = reader.rows(range(10))

    class Meddled(LocalObjects):
        turns = 0

        def open(self, key):
            if key.endswith("c.0.0.0.0") and not self.turns:
                Meddled.turns += 1
                lab.fill(lab.start(tmp_path / "s", 10, changed=[4])[1])
            return super().open(key)

    meddled = dataclasses.replace(reader, objects=Meddled(reader.objects.root))
    with pytest.raises(NotCommittedError, match=r"'img0004'.*stale"):
        meddled.rows([3, 4])
    Meddled.turns = 0
    lab.fill(lab.start(tmp_path / "s", 10)[1])
    np.testing.assert_array_equal(meddled.rows([3, 5]), want[[3, 5]])
    assert Meddled.turns == 1


def test_a_block_is_locked_against_other_processes(tmp_path, lab, workers):
    _, run = lab.start(tmp_path / "s", 10)
    first = next(iter(run.layers))
    with run.dataset.objects.lock(f"{run.path}/{first}/0"):
        workers.start(url=tmp_path / "s", n=10)
        time.sleep(0.7)
        assert not run.committed(first).any()
    assert workers.wait()[0]["error"] is None
    assert run.committed(first).all()


def test_two_tables_grow_at_once(tmp_path, lab):
    store, _ = lab.full(tmp_path / "s", 10)
    tables = [
        fs.SampleTable(
            keys=("img0000", f"extra{i}"), digests=(lab.digest(0), lab.digest(1000 + i)), splits=("train", "train")
        )
        for i in range(8)
    ]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda table: store.put_samples("toy", table, source="made up"), tables))
    dataset = fs.open(tmp_path / "s").dataset("toy")
    assert len(dataset.samples) == 18
    assert set(dataset.samples.keys) >= {f"extra{i}" for i in range(8)}
    assert dataset.runs()[0].valid(["up1"]).tolist() == [row < 10 for row in range(18)]


def test_layers_added_at_once_are_all_kept(tmp_path, lab):
    store, run = lab.start(tmp_path / "s", 10)

    def add(i):
        layers = {f"extra{i}": (1, 2, 2)}
        return store.dataset("toy").create_run(lab.recipe(), layers, batch_size=8, provenance={"who": i})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(6)))
    run = fs.open(tmp_path / "s").dataset("toy").runs()[0]
    assert set(run.layers) == {*lab.LAYERS, *(f"extra{i}" for i in range(6))}

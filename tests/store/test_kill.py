"""Writers that die, full disks, and what `committed` says afterwards: always the truth."""

from __future__ import annotations

import random
import shutil
import time

import numpy as np
import pytest

import featstore.store as fs
from featstore.store import layout, shard
from featstore.store.objects import INTERNAL

N = 200


def check_truth(url, lab):
    """Every row that a record names holds the bytes of the very image whose digest it names."""
    run = fs.open(url).dataset("toy").find(lab.recipe())
    named = 0
    for layer, info in run.layers.items() if run else ():
        for block in range(run.n_blocks):
            rows = run.block_rows(block)
            record = run.committed(layer)[rows.start : rows.stop]
            slots = np.flatnonzero(record).tolist()
            named += len(slots)
            if not slots:
                continue
            got = np.empty((len(slots), *info.shape), dtype=info.dtype)
            padded = np.zeros(run.block_length, dtype=np.uint64)
            padded[: len(record)] = record
            key = layout.shard_key(run.path, layer, block)
            assert not shard.read(run.dataset.objects, key, padded, slots, [shard.byte_view(row) for row in got])
            for slot, row in zip(slots, got, strict=True):
                np.testing.assert_array_equal(row, lab.map_of(int(record[slot]), layer))
    return named


def leftovers(url):
    return [p.name for p in (url / INTERNAL).glob("*.partial")]


def kill_at_random(tmp_path, lab, workers, kills):
    """Kill a writer again and again, images changing meanwhile; then finish and compare."""
    rng = random.Random(kills)
    url = tmp_path / "s"
    job = {"n": N, "piece": 8}
    begin = time.perf_counter()
    result, _ = workers.run(url=tmp_path / "timing", **job)
    seconds = {"pid": time.perf_counter() - begin, "filling": result["seconds"]}
    killed = named = 0
    partial = 0
    states = 0
    while killed < kills:
        # Each job takes up where the last died. Every few deaths other images have changed, so that
        # there is something to do and rows are replaced as well as added.
        job["changed"] = sorted(rng.sample(range(N), 40)) if states % 3 else []
        states += 1
        phase = "filling" if states % 4 else "pid"
        killed += workers.kill_after(phase, rng.uniform(0, seconds[phase] * 0.6), url=url, **job)
        if (url / "toy" / "zarr.json").exists():
            named += check_truth(url, lab)
            partial += bool(leftovers(url))
    assert named
    result, _ = workers.run(url=url, **job)
    assert result["error"] is None
    lab.full(tmp_path / "undisturbed", N, changed=job["changed"])
    assert leftovers(url) == []
    ours, theirs = lab.files(url), lab.files(tmp_path / "undisturbed")
    assert set(ours) == set(theirs)
    for name in theirs:
        # Places within a shard are the same as rows are laid down in their order.
        assert ours[name] == theirs[name], name
    return partial


def test_killed_ten_times_and_resumed_equals_undisturbed(tmp_path, lab, workers):
    kill_at_random(tmp_path, lab, workers, 10)


@pytest.mark.full
def test_killed_a_hundred_times_and_resumed_equals_undisturbed(tmp_path, lab, workers):
    assert kill_at_random(tmp_path, lab, workers, 100) > 10


def test_killed_before_every_single_step_on_disk(tmp_path, lab, workers):
    """One block: rows 0..9 valid, then 3 and 5 change, 10..19 are added; die before each step of that."""
    lab.full(tmp_path / "want", 20, changed=[3, 5])
    want = lab.files(tmp_path / "want")
    lab.full(tmp_path / "before", 10)
    lab.start(tmp_path / "before", 20, changed=[3, 5])
    step, partial = 0, 0
    while True:
        step += 1
        url = tmp_path / f"s{step}"
        shutil.copytree(tmp_path / "before", url)
        result, status = workers.run(url=url, n=20, changed=[3, 5], die_at=step)
        check_truth(url, lab)
        partial += bool(leftovers(url))
        # The images turn back, or stay: either way nobody reads features of the other.
        for changed in ([], [3, 5]):
            fs.create(url).put_samples("toy", lab.table(20, changed), source="made up")
            run = fs.open(url).dataset("toy").runs()[0]
            for layer in lab.LAYERS:
                rows = np.flatnonzero(run.valid([layer]))
                np.testing.assert_array_equal(run.numpy(layer, rows), lab.maps_of(run, rows, layer))
        assert workers.run(url=url, n=20, changed=[3, 5])[0]["error"] is None
        assert lab.files(url) == want
        if status == 0:
            break
    assert result["error"] is None
    # A write, its fsync, the rename and the folder's fsync: five times (mark, uncommit, mark, shard, commit) for each
    # of two layers, and for the note of complete blocks and catalog.json. Folders of records are synced at the end.
    puts = 5 * 2 + 2
    assert step - 1 == 4 * puts
    # Dying before the write (the file is open), its fsync or the rename leaves an unfinished file.
    assert partial == 3 * puts


@pytest.mark.parametrize("kib", [4, 8, 16])
def test_no_room_for_a_file_leaves_the_truth_and_a_hint(tmp_path, lab, workers, kib):
    """A limit on the size of files stands for a full disk: the kernel refuses the write in the same place."""
    url = tmp_path / "s"
    lab.start(url, 100)
    fs.create(url).finish()
    # A shard of the first 20, 40 and 60 images of the larger layer has 6, 11 and 17 KiB.
    result, _ = workers.run(url=url, n=100, file_limit_bytes=kib * 1024, piece=20)
    assert result["error"] == "StorageError"
    assert "File too large" in result["message"]
    assert "ulimit -f" in result["hint"]
    assert leftovers(url) == []
    named = check_truth(url, lab)
    assert named == {4: 0, 8: 2 * 20, 16: 2 * 40}[kib]
    assert workers.run(url=url, n=100)[0]["error"] is None
    lab.full(tmp_path / "want", 100)
    assert lab.files(url) == lab.files(tmp_path / "want")

"""A power cut after every single step of a writer, in the worst ways that a disk may forget: the record stays true."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest

import featstore.store as fs
from featstore.errors import FeatstoreError, NotFoundError
from featstore.store import completeness, leases, local, partial
from featstore.store import store as stores
from featstore.store.committed import as_records
from featstore.store.objects import INTERNAL
from featstore.store.verify import verify
from tests.store import power
from tests.store.fake_remote import FakeRemote
from tests.store.test_kill import check_truth


def extract(url, lab, n, changed=()):
    """What an extraction does to the disk, one step after the other: leases, blocks, leases given back, the end."""
    store, run = lab.start(url, n, changed)
    for block in range(run.n_blocks):
        lease = leases.acquire(run.dataset.objects, run.path, block)
        assert isinstance(lease, leases.Lease)
        lab.fill(run, piece=8, rows=run.block_rows(block))
        assert lease.renew()
        lease.release()
    store.finish([run])


def work(url, lab):
    """A store is made, grows while two images have changed, and one image is turned back."""
    extract(url, lab, 10)
    extract(url, lab, 70, changed=[3, 5])
    extract(url, lab, 70, changed=[3])


def record(tmp_path, lab, monkeypatch):
    """The steps on disk of `work`."""
    recorder = power.Recorder()
    (tmp_path / "recorded").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(local, "os", recorder)
        work(tmp_path / "recorded" / "s", lab)
    return recorder.log


@pytest.fixture
def log(tmp_path, lab, monkeypatch):
    return record(tmp_path, lab, monkeypatch)


def check_note(run):
    """The note of complete blocks calls none complete whose record does not say so."""
    for layer, said in completeness.read(run.dataset.objects, run.path).items():
        record = run.committed(layer)
        wanted = as_records(run.dataset.samples.digest_bytes(0, run.n_images))
        for block in range(min(len(said), run.n_blocks)):
            if said[block] == run.block_digests[block]:
                rows = run.block_rows(block)
                assert np.array_equal(record[rows.start : rows.stop], wanted[rows.start : rows.stop])


def check(url, lab):
    """Whatever is called there is there; how many rows that are."""
    try:
        store = fs.open(url)
        dataset = store.dataset("toy")
    except NotFoundError:
        return 0
    named = check_truth(url, lab)
    run = dataset.find(lab.recipe())
    if run is not None:
        check_note(run)
        for layer in run.layers:
            rows = np.flatnonzero(run.valid([layer]))
            if rows.size:
                np.testing.assert_array_equal(run.numpy(layer, rows), lab.maps_of(run, rows, layer))
    report = verify(store)
    # Documents and the copies of them may be at odds until the same extraction runs again, features may not.
    assert not [text for text in report.corrupt if "/c." in text and "/samples/" not in text], report.corrupt
    return named


class Later:
    """The clock when somebody resumes: leases that the cut has left behind are over."""

    sleep, monotonic = time.sleep, time.monotonic

    @staticmethod
    def time():
        return time.time() + 10 * leases.TTL_SECONDS


class Memory(FakeRemote):
    """What a power cut has left, to be looked at and to be written on."""

    parallel_reads = 1

    def sweep(self):
        unfinished = [key for key in self.content if key.startswith(INTERNAL) and key.endswith(partial.SUFFIX)]
        for key in unfinished:
            del self.content[key]
        return unfinished


def cut_everywhere(lab, log, monkeypatch, told, *, root, every, randoms, resume_every):
    rng = random.Random(0)
    left = Memory()
    monkeypatch.setattr(stores, "objects_at", lambda url: left)
    extract("want", lab, 70, changed=[3])
    want = comparable(left)
    disk = power.Disk(root)
    seen, cuts, named, resumed = set(), 0, 0, 0
    for number, step in enumerate(log):
        disk.step(*step)
        if number % every and number != len(log) - 1:
            continue
        for tree in disk.outcomes(rng, randoms):
            state = hash(frozenset(tree.items()))
            if state in seen:
                continue
            seen.add(state)
            left = Memory()
            left.content = {name.removeprefix("s/"): data for name, data in tree.items()}
            named += check("cut", lab)
            cuts += 1
            if cuts % resume_every == 0:
                with monkeypatch.context() as patch:
                    for module in (leases, completeness):
                        patch.setattr(module, "time", Later)
                    extract("cut", lab, 70, changed=[3])
                assert check("cut", lab) == 2 * 70
                assert verify(fs.open("cut")).ok
                assert comparable(left) == want
                resumed += 1
    told(
        f"{len(log)} steps on disk, power cut at every {every}: {cuts} different states of the disk, {named} rows "
        f"named by records in them, all true; {resumed} states resumed, all to the same bytes"
    )
    return cuts, resumed


def comparable(objects):
    """Content of a store but for what differs from day to day: leases, marks, and the mark that a note names."""
    return {
        key: json.loads(data)["blocks"] if key.endswith(".complete") else data
        for key, data in objects.content.items()
        if not key.startswith(INTERNAL) and not key.endswith(".mark")
    }


def test_some_power_cuts(tmp_path, lab, log, monkeypatch, told):
    root = tmp_path / "recorded"
    cuts, resumed = cut_everywhere(lab, log, monkeypatch, told, root=root, every=11, randoms=0, resume_every=10)
    assert cuts > 100
    assert resumed > 10


@pytest.mark.parametrize("forgotten", ["file", "folder"])
def test_a_writer_that_forgets_to_sync_is_caught(tmp_path, lab, monkeypatch, told, forgotten):
    """The check itself: with one of the two kinds of fsync left out a power cut makes a record lie, which is seen."""
    with monkeypatch.context() as patch:
        if forgotten == "file":
            write = local._write
            patch.setattr(local, "_write", lambda path, buffers, durable: write(path, buffers, durable=False))
        else:
            patch.setattr(local.LocalObjects, "_sync_folder", lambda self, path: None)
        log = record(tmp_path, lab, monkeypatch)
    with pytest.raises((AssertionError, FeatstoreError)):
        cut_everywhere(lab, log, monkeypatch, told, root=tmp_path / "recorded", every=3, randoms=4, resume_every=10**9)


@pytest.mark.full
def test_a_power_cut_after_every_step(tmp_path, lab, log, monkeypatch, told):
    root = tmp_path / "recorded"
    cuts, resumed = cut_everywhere(lab, log, monkeypatch, told, root=root, every=1, randoms=4, resume_every=5)
    assert cuts > 1000
    assert resumed > 200

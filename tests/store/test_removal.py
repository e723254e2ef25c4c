"""Removing runs and data sets, also when that is cut off; and making rows absent for ``--overwrite``."""

from __future__ import annotations

import numpy as np
import pytest

import featstore.store as fs
from featstore.errors import BadRequestError, BusyError, NotCommittedError, NotFoundError, StorageError
from featstore.store import completeness, layout, leases, store
from featstore.store.objects import INTERNAL
from featstore.store.removal import remove_dataset, remove_runs, require_idle, runs_of
from featstore.store.verify import verify
from tests.store.fake_remote import FakeRemote

N = 150


def nothing(_):
    pass


def remove(url, *paths):
    opened = fs.create(url)
    found = {one.path: one for one in runs_of(opened, "toy")}
    remove_runs(opened, [found[path] for path in paths], nothing)


def features(lab, url):
    """What a store holds but for notes about it, which say when they were made."""
    notes = (".mark", ".complete")
    return {n: data for n, data in lab.files(url).items() if not (n.startswith(INTERNAL) or n.endswith(notes))}


@pytest.fixture
def two(tmp_path, lab):
    """A store of two runs at ``s``; the paths of both."""
    paths = []
    for technique in ("basic", "prompt"):
        opened, run = lab.full(tmp_path / "s", N, technique=technique)
        paths.append(run.path)
    opened.finish(opened.find())
    return paths


def test_one_goes_and_the_other_stays_byte_for_byte(tmp_path, lab, two):
    before = features(lab, tmp_path / "s")
    remove(tmp_path / "s", two[0])
    after = features(lab, tmp_path / "s")
    slug = two[0].replace("/", "~")
    kept = {n: d for n, d in before.items() if slug not in n and two[0].rpartition("/")[0] not in n}
    del kept["catalog.json"]
    assert after.keys() == {*kept, "catalog.json"}
    assert all(after[name] == data for name, data in kept.items())
    assert [run.path for run in fs.open(tmp_path / "s").dataset("toy").runs()] == [two[1]]
    assert not list((tmp_path / "s/toy").rglob("basic*"))
    report = verify(fs.open(tmp_path / "s"))
    assert report.ok, report
    remove(tmp_path / "s", two[1])
    assert [path.name for path in (tmp_path / "s/toy").iterdir() if path.name != "samples"] == ["zarr.json"]
    assert verify(fs.open(tmp_path / "s")).ok


def test_timesteps_of_one_technique_go_apart(tmp_path, lab):
    paths = [lab.full(tmp_path / "s", 5, timestep=t)[1].path for t in (0, 50)]
    remove(tmp_path / "s", paths[0])
    assert [run.path for run in fs.open(tmp_path / "s").find()] == [paths[1]]
    assert verify(fs.open(tmp_path / "s")).ok


def test_a_run_is_extracted_anew_after_it_was_removed(tmp_path, lab, two):
    remove(tmp_path / "s", two[0])
    opened, run = lab.start(tmp_path / "s", N, technique="basic")
    assert not run.valid(list(run.layers)).any()
    lab.fill(run)
    opened.finish(opened.find())
    for technique in ("basic", "prompt"):
        whole, _ = lab.full(tmp_path / "want", N, technique=technique)
    whole.finish(whole.find())
    assert features(lab, tmp_path / "s") == features(lab, tmp_path / "want")


class Power(Exception):  # noqa: N818 - it stands for a power cut, which is no error of anybody's
    pass


def test_cut_off_before_every_step_nothing_looks_whole_and_the_next_call_finishes(tmp_path, lab, monkeypatch):
    """Each put and delete of a removal in turn is the one before which everything ends."""
    remote = FakeRemote()
    remote.parallel_reads = 1  # One step after the other.
    monkeypatch.setattr(store, "objects_at", lambda _: remote)
    opened, run = lab.full("x", 70)
    lab.full("x", 70, technique="basic")
    opened.finish(opened.find())
    full = dict(remote.content)
    states = []
    for step in range(1, 100):
        remote.content = dict(full)
        count = 0

        def ask(kind, _key, step=step):
            nonlocal count
            count += kind in ("put", "delete")
            if kind in ("put", "delete") and count == step:
                raise Power

        monkeypatch.setattr(remote, "ask", ask)
        try:
            remove("x", run.path)
        except Power:
            finished = False
        else:
            finished = True
        monkeypatch.setattr(remote, "ask", lambda *_: None)
        states.append(check_state(lab, remote, run.path))
        remove_left(run.path)
        left = [key for key in remote.content if run.path in key or run.path.replace("/", "~") in key]
        assert [key for key in left if not key.startswith(INTERNAL)] == []
        assert verify(fs.open("x")).ok
        if finished:
            break
    assert finished
    # It goes from whole over some rows and none, to gone.
    assert states[0] == ("listed", 140)
    assert states[-1] == ("gone", 0)
    assert states == sorted(states, key=lambda state: (("listed", "found", "gone").index(state[0]), -state[1]))
    assert len(set(states)) > 4


def check_state(lab, remote, path):
    """How much of the run is still there, every row of it as it was; the other run is whole."""
    dataset = fs.open("x").dataset("toy")
    listed = path in [run.path for run in dataset.runs()]
    run = dataset.find(lab.recipe())
    other = dataset.find(lab.recipe(technique="basic"))
    assert other.valid(list(other.layers)).all()
    if run is None:
        assert not listed
        assert not [key for key in remote.content if key.startswith(f"{path}/{layout.COMMITTED}/")]
        return "gone", 0
    rows = 0
    for layer in run.layers:
        # Nothing counts as there, by records or by the note of complete blocks, but what can be read.
        documents = {key for key, _ in run.array_documents(layer)}
        if not documents <= remote.content.keys():
            continue
        there = np.flatnonzero(run.valid([layer]))
        rows += len(there)
        if len(there):
            np.testing.assert_array_equal(run.numpy(layer, there), lab.maps_of(run, there, layer))
    return ("listed" if listed else "found"), rows


def remove_left(path):
    opened = fs.create("x")
    remove_runs(opened, [one for one in runs_of(opened, "toy") if one.path == path], nothing)


def test_a_run_whose_document_is_damaged_goes_too(tmp_path, lab, two):
    (tmp_path / "s" / two[0] / "zarr.json").write_bytes(b"{}")
    found = runs_of(fs.open(tmp_path / "s"), "toy")
    assert [(one.path, one.run is None) for one in found] == [(two[0], True), (two[1], False)]
    remove(tmp_path / "s", two[0])
    assert verify(fs.open(tmp_path / "s")).ok


def test_a_run_that_is_being_written_stays(tmp_path, lab, two):
    objects = fs.create(tmp_path / "s").objects
    lease = leases.acquire(objects, two[1], 0)
    before = features(lab, tmp_path / "s")
    with pytest.raises(BusyError, match=f"{two[1]} is being written by") as caught:
        remove(tmp_path / "s", *two)
    assert "wait" in caught.value.hint
    with pytest.raises(BusyError):
        remove_dataset(fs.create(tmp_path / "s"), "toy", nothing)
    assert features(lab, tmp_path / "s") == before
    require_idle(objects, [two[0]])
    lease.release()
    remove(tmp_path / "s", *two)
    assert fs.open(tmp_path / "s").find() == []


def test_nothing_goes_from_a_store_that_is_open_for_reading(tmp_path, two):
    opened = fs.open(tmp_path / "s")
    with pytest.raises(StorageError, match="reading only"):
        remove_runs(opened, runs_of(opened, "toy"), nothing)
    with pytest.raises(StorageError, match="reading only"):
        remove_dataset(opened, "toy", nothing)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_data_set_goes_with_all_that_belongs_to_it(tmp_path, lab, precision):
    opened, _ = lab.full(tmp_path / "s", N, precision=precision)
    opened.put_samples("toys", lab.table(3), source="made up")
    opened.finish()
    counted = []
    remove_dataset(opened, "toy", counted.append)
    after = features(lab, tmp_path / "s")
    assert not [name for name in after if name.startswith("toy/") or "/toy~" in name or name == "catalog/toy.json"]
    assert not (tmp_path / "s/toy").exists()
    assert fs.open(tmp_path / "s").datasets() == ["toys"]
    assert b'"toy"' not in after["catalog.json"]
    assert sum(counted) > 20
    assert verify(fs.open(tmp_path / "s")).ok
    with pytest.raises(NotFoundError, match="there are: toys"):
        remove_dataset(opened, "toy", nothing)
    with pytest.raises(BadRequestError):
        remove_dataset(opened, "..", nothing)
    lab.full(tmp_path / "s", N, precision=precision)
    assert verify(fs.open(tmp_path / "s")).ok


def test_a_data_set_that_was_half_removed_goes_whole(tmp_path, lab, two):
    (tmp_path / "s/toy/zarr.json").unlink()
    remove_dataset(fs.create(tmp_path / "s"), "toy", nothing)
    assert not [name for name in features(lab, tmp_path / "s") if "toy" in name]
    assert not (tmp_path / "s/toy").exists()


def test_uncommitted_rows_are_absent_and_all_others_stay(tmp_path, lab):
    opened, run = lab.full(tmp_path / "s", N)
    opened.finish([run])
    assert completeness.read(opened.objects, run.path)
    assert run.uncommit([3, 70, 3, 149], ["up1"]) == 3
    assert run.uncommit([3, 71]) == 2
    assert run.uncommit([3, 71]) == 0
    gone = {"up1": [3, 70, 71, 149], "attn-up-cross-2": [3, 71]}
    run = fs.open(tmp_path / "s").dataset("toy").runs()[0]
    for layer, rows in gone.items():
        assert np.flatnonzero(~run.valid([layer])).tolist() == rows
        there = np.flatnonzero(run.valid([layer]))
        np.testing.assert_array_equal(run.numpy(layer, there), lab.maps_of(run, there, layer))
        with pytest.raises(NotCommittedError, match="absent"):
            run.numpy(layer, [3])
    run = fs.create(tmp_path / "s").dataset("toy").runs()[0]
    lab.fill(run)
    opened.finish([run])
    lab.full(tmp_path / "want", N)[0].finish(fs.open(tmp_path / "want").find())
    whole = fs.create(tmp_path / "want")
    whole.finish(whole.find())
    assert features(lab, tmp_path / "s") == features(lab, tmp_path / "want")


def test_overwritten_rows_hold_the_new_bytes(tmp_path, lab):
    """What ``--overwrite`` is for: bytes of valid rows that are brought again count for nothing else."""
    _, run = lab.full(tmp_path / "s", 20)
    new = {layer: lab.maps_of(run, range(4, 9), layer) + np.float16(1) for layer in lab.LAYERS}
    assert run.write_block(0, range(4, 9), new) == 0
    assert run.uncommit(range(4, 9)) == 5
    assert run.write_block(0, range(4, 9), new) > 0
    for layer, maps in new.items():
        np.testing.assert_array_equal(run.numpy(layer, range(4, 9)), maps)
        np.testing.assert_array_equal(run.numpy(layer, range(4)), lab.maps_of(run, range(4), layer))


def test_a_broken_record_is_given_up_whole(tmp_path, lab):
    _, run = lab.full(tmp_path / "s", N)
    path = tmp_path / "s" / run.path / "committed/up1/c.1"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert run.uncommit([64], ["up1"]) == 1
    valid = fs.open(tmp_path / "s").dataset("toy").runs()[0].valid(["up1"])
    assert valid.tolist() == [row not in range(64, 128) for row in range(N)]


def test_what_cannot_be_uncommitted(tmp_path, lab):
    _, run = lab.full(tmp_path / "s", 5)
    with pytest.raises(BadRequestError, match=r"outside 0\.\.4"):
        run.uncommit([5])
    with pytest.raises(NotCommittedError, match="unknown layer 'up2'"):
        run.uncommit([0], ["up1", "up2"])
    with pytest.raises(StorageError, match="reading only"):
        fs.open(tmp_path / "s").dataset("toy").runs()[0].uncommit([0])
    assert run.valid(list(run.layers)).all()

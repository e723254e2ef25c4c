"""The note of complete blocks never calls complete what is not, whoever does what at the same time and dies where."""

from __future__ import annotations

import contextlib
import json
import random

import numpy as np
import pytest

import featstore.store as fs
from featstore.store import completeness, metadata, write
from featstore.store import store as stores
from featstore.store.committed import read_record
from featstore.store.verify import verify
from tests.store import stepped
from tests.store.test_faults_power import check_note

LAYERS = {"up1": (1, 2, 2)}
N = 3


@pytest.fixture
def content(lab, monkeypatch):
    """A complete run of one block and one layer, as the keys and bytes of its store."""
    objects = stepped.Stepped({})
    with monkeypatch.context() as patch:
        patch.setattr(stores, "objects_at", lambda url: objects)
        store, run = lab.start("x", N, layers=LAYERS)
        run.write_block(0, range(N), {"up1": np.ones((N, 1, 2, 2), dtype=np.float16)})
        store.finish()
    return objects.content


def opened(objects):
    """The run, all of it read that is read only once."""
    run = stores.Store("x", objects, writable=True).dataset("toy").runs()[0]
    assert len(run.block_digests) == 1
    run.reader("up1")
    return run


def notes(objects):
    run = opened(objects)
    return run.note_complete


def uncommits(objects):
    run = opened(objects)
    value = int(run.dataset.samples.digests[1][:16], 16)
    return lambda: write.uncommit(objects, run.path, "up1", 0, run.block_length, {1: value})


def claims(objects):
    run = opened(objects)
    return bool(completeness.read(objects, run.path))


def watch(objects):
    check_note(opened(objects))


def with_note(content):
    objects = stepped.Stepped(content)
    notes(objects)()
    assert claims(objects)
    return objects.content


@pytest.mark.parametrize("noted", [False, True])
def test_a_note_is_made_while_rows_are_uncommitted(content, told, noted):
    """Every order of the steps of both."""
    content = with_note(content) if noted else content
    counts = [stepped.steps_of(content, one) for one in (notes, uncommits)]
    played = 0
    for order in stepped.orders(*counts):
        objects, errors = stepped.play(content, [notes, uncommits], order, watch=watch)
        assert errors == [None, None]
        assert read_record(objects, opened(objects).path, "up1", 0, 64)[1] == 0
        played += 1
    told(f"{played} orders of {counts[0]} steps of one and {counts[1]} of the other: the note never lied")
    assert played > 50


@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_them_dies_anywhere(content, told, killed):
    content = with_note(content)
    counts = [stepped.steps_of(content, one) for one in (notes, uncommits)]
    begun = sorted({order[:length] for order in stepped.orders(*counts) for length in range(len(order))})
    some = random.Random(0).sample(begun, min(len(begun), 400))
    for order in some:
        objects, _ = stepped.play(content, [notes, uncommits], order, killed=killed, watch=watch)
        # Somebody else makes a note, and uncommits, later.
        for later in (notes, uncommits, notes):
            later(objects)()
            watch(objects)
    told(f"{len(some)} moments of death: the note never lied")
    assert len(some) > 50


@pytest.mark.full
def test_two_make_notes_while_rows_are_uncommitted(content, told):
    content = with_note(content)
    callers = [notes, notes, uncommits]
    counts = [stepped.steps_of(content, one) for one in callers]
    shuffle = random.Random(1)
    for _ in range(3000):
        order = [number for number, count in enumerate(counts) for _ in range(count)]
        shuffle.shuffle(order)
        killed = shuffle.choice([None, 0, 1, 2])
        length = shuffle.randrange(len(order) + 1) if killed is not None else len(order)
        stepped.play(content, callers, order[:length], killed=killed, watch=watch)
    told("3000 orders of three, two thirds of them with one dying: the note never lied")


def test_a_mark_on_one_side_only_would_not_do(content, monkeypatch):
    """What the watching is worth: without the second mark some order makes the note lie."""

    @contextlib.contextmanager
    def withdrawn(objects, run):
        completeness._replace_mark(objects, run, until=0.0)
        yield

    monkeypatch.setattr(completeness, "withdrawn", withdrawn)
    counts = [stepped.steps_of(content, one) for one in (notes, uncommits)]
    lies = 0
    for order in stepped.orders(*counts):
        try:
            stepped.play(content, [notes, uncommits], order, watch=watch)
        except AssertionError:
            lies += 1
    assert lies


def test_a_plan_goes_by_the_note_and_looks_singly_at_the_rest(tmp_path, lab):
    """What is complete costs no record; an image that was added or changed since does, and its block alone."""
    _, run = lab.full(tmp_path / "s", 130)
    _, run = lab.start(tmp_path / "s", 140, changed=[70])
    looked = []
    objects = run.dataset.objects
    genuine = objects.get

    def get(key, **options):
        if "/committed/" in key and key.rpartition("/")[2].startswith("c."):
            looked.append(key.rpartition("/")[2])
        return genuine(key, **options)

    objects.get = get
    valid = run.valid(list(run.layers))
    assert np.flatnonzero(~valid).tolist() == [70, *range(130, 140)]
    assert sorted(looked) == ["c.1", "c.1", "c.2", "c.2"]


def test_a_note_of_a_killed_uncommitter_is_made_anew_at_once(tmp_path, lab, workers):
    """Its mark says who is at it; where that process can be seen to be gone, nobody waits for ten minutes."""
    _, run = lab.full(tmp_path / "s", 20)
    # Dying before its sixth step: the mark stands, the record is being put.
    assert workers.run(url=tmp_path / "s", n=20, changed=[3], die_at=6)[1] == 9
    objects = run.dataset.objects
    assert completeness._mark(objects, run.path).until > 0
    assert completeness.read(objects, run.path) == {}
    _, run = lab.full(tmp_path / "s", 20)
    assert completeness.read(objects, run.path).keys() == lab.LAYERS.keys()


def test_no_note_is_made_while_somebody_elsewhere_uncommits(tmp_path, lab, monkeypatch):
    store, run = lab.full(tmp_path / "s", 20)
    objects = run.dataset.objects
    with monkeypatch.context() as patch:
        patch.setattr(completeness.partial, "place", lambda: "0" * 12)
        with completeness.withdrawn(objects, run.path):
            patch.undo()
            store.finish([run])
            assert completeness.read(objects, run.path) == {}
            now = completeness.time.time()
            for later, noted in ((590, False), (610, True), (-3000, True)):
                patch.setattr(completeness.time, "time", lambda now=now, later=later: now + later)
                assert (completeness.begin(objects, run.path) is not None) == noted
                patch.undo()
    store.finish([run])
    assert completeness.read(objects, run.path).keys() == lab.LAYERS.keys()


@pytest.mark.parametrize(
    "change",
    [
        {"path": "toy/other"},
        {"mark": 5},
        {"blocks": 5},
        {"blocks": {"up1": 5}},
        {"blocks": {"up1": "not base64!"}},
        {"blocks": {"up1": "YQ=="}},
        {"blocks": []},
    ],
)
def test_a_note_that_makes_no_sense_counts_for_nothing(tmp_path, lab, change):
    """Sealed correctly, so only the content gives it away."""
    _, run = lab.full(tmp_path / "s", 20)
    path = tmp_path / "s" / completeness.snapshot_key(run.path)
    path.write_bytes(metadata.seal(json.loads(path.read_bytes()) | change))
    assert completeness.read(run.dataset.objects, run.path) == {}
    assert fs.open(tmp_path / "s").dataset("toy").runs()[0].valid(list(lab.LAYERS)).all()
    report = verify(fs.create(tmp_path / "s"), repair=True)
    assert len(report.corrupt) == 1
    assert "withdrawn" in report.corrupt[0]
    assert verify(fs.open(tmp_path / "s")).ok


def test_verify_finds_a_note_that_lies_and_withdraws_it(tmp_path, lab):
    """A record that is gone, which nothing else would notice: neither a plan, which goes by the note, nor a reader."""
    _, run = lab.full(tmp_path / "s", 130)
    (tmp_path / "s" / run.path / "committed" / "up1" / "c.1").unlink()
    run = fs.open(tmp_path / "s").dataset("toy").runs()[0]
    assert run.valid(["up1"]).all()
    report = verify(fs.open(tmp_path / "s"))
    assert len(report.corrupt) == 1
    assert "calls complete what is not: up1 block 1; `featstore verify --repair` withdraws it" in report.corrupt[0]
    assert report.incomplete == (f"{run.path}/up1: 64 absent of 130 images",)
    assert verify(fs.create(tmp_path / "s"), repair=True).repaired == 1
    assert (~run.valid(["up1"])).sum() == 64
    lab.full(tmp_path / "s", 130)
    assert verify(fs.open(tmp_path / "s")).ok

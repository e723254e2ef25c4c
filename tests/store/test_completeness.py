"""The note of complete blocks never calls complete what is not, whoever does what at the same time and dies where."""

from __future__ import annotations

import random

import numpy as np
import pytest

import featstore.store as fs
from featstore.store import completeness
from featstore.store import store as stores
from featstore.store import write
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

    class OnlyBefore(completeness.withdrawn.__wrapped__.__class__ if False else object):
        pass

    import contextlib

    @contextlib.contextmanager
    def withdrawn(objects, run):
        completeness._replace_mark(objects, run, until=0.0)
        yield

    monkeypatch.setattr(completeness, "withdrawn", withdrawn)
    counts = [stepped.steps_of(content, one) for one in (notes, uncommits)]
    with pytest.raises(AssertionError):
        for order in stepped.orders(*counts):
            stepped.play(content, [notes, uncommits], order, watch=watch)

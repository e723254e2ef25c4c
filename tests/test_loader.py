"""Batches for DataLoader: one order whatever the number of workers, from where they stopped, and no hang."""

from __future__ import annotations

import json
import os
import pickle
import signal

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader

import featstore
from featstore.errors import BadRequestError, CorruptError, IncompatibleError, NotCommittedError, StorageError
from featstore.loader import FeatureDataset, FeatureLoader
from featstore.recipe import Recipe
from featstore.store import SampleTable

# Four workers on two cores are what these tests want.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

IMAGES, BATCH = 150, 8
SHAPES = {"coarse": (3, 2, 2), "fine": (2, 4, 6)}


def values(run, name, rows):
    """Maps that say which they are."""
    size = int(np.prod(SHAPES[name]))
    each = np.asarray(rows)[:, None] + 0.25 * run + np.linspace(0, 0.125, size)[None]
    return each.reshape(-1, *SHAPES[name]).astype(np.float32)


def fill(url, committed=IMAGES):
    store = featstore.create(url)
    keys = tuple(f"{number:04d}.png" for number in range(IMAGES))
    table = SampleTable(
        keys=keys, digests=tuple(f"{number + 1:064x}" for number in range(IMAGES)), splits=("all",) * IMAGES
    )
    stored = store.put_samples("made-up", table, source="made up")
    runs = []
    for number in range(2):
        recipe = Recipe(
            model="none",
            weights_digest="0" * 64,
            technique=("basic", "prompt")[number],
            parameters={},
            timestep=50,
            height_px=64,
            width_px=64,
            precision="float32",
        )
        run = stored.create_run(recipe, SHAPES, batch_size=1, provenance={})
        for block in range(run.n_blocks):
            rows = [row for row in run.block_rows(block) if row < committed]
            if rows:
                run.write_block(block, rows, {name: values(number, name, rows) for name in SHAPES})
        runs.append(run)
    store.finish(runs)
    return runs


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    place = str(tmp_path_factory.mktemp("loader") / "s.zarr")
    assert len({run.block_length for run in fill(place)}) == 1
    return place


def opened(url, **options):
    runs = featstore.open(url).dataset("made-up").bucket(["basic", "prompt"]).runs
    return FeatureDataset(runs, **{"batch": BATCH, "seed": 5, "window_blocks": 2, **options})


def check(maps):
    for name in SHAPES:
        want = np.stack([values(run, name, maps.rows) for run in range(2)], 1)
        np.testing.assert_array_equal(maps.layers[name].numpy(), want)


def orders(batches):
    return [maps.rows.tolist() for maps in batches]


def test_an_epoch_gives_every_image_once_in_shuffled_batches(url):
    dataset = opened(url)
    batches = list(dataset)
    for maps in batches:
        check(maps)
    assert len(batches) == len(dataset) == -(-IMAGES // BATCH)
    assert [len(maps.rows) for maps in batches] == [BATCH] * (IMAGES // BATCH) + [IMAGES % BATCH]
    seen = [row for maps in batches for row in maps.rows.tolist()]
    assert sorted(seen) == list(range(IMAGES))
    assert seen != sorted(seen)


def test_images_of_a_window_lie_in_a_few_blocks(url):
    dataset = opened(url, batch=64)
    (run, _) = featstore.open(url).dataset("made-up").bucket(["basic", "prompt"]).runs
    for rows in dataset.order(0)[:1]:
        assert len(set((rows // run.block_length).tolist())) <= 2


def test_the_order_is_that_of_seed_and_epoch(url):
    assert str(opened(url).order(3)) == str(opened(url).order(3))
    others = [opened(url).order(4), opened(url, seed=6).order(3)]
    assert all(str(one) != str(opened(url).order(3)) for one in others)


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_give_the_same_batches_in_the_same_order_epoch_after_epoch(url, workers):
    alone, together = FeatureLoader(opened(url)), FeatureLoader(opened(url), workers=workers)
    for epoch in range(3):
        got = list(together)
        for maps in got:
            check(maps)
        assert orders(got) == orders(alone) == [rows.tolist() for rows in opened(url).order(epoch)]


def test_a_plain_dataloader_does_as_well(url):
    dataset = opened(url)
    dataset.set_epoch(2)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert orders(loader) == [rows.tolist() for rows in dataset.order(2)]


def test_a_bucket_of_s3(s3):
    fill(s3.url)
    loader = FeatureLoader(opened(s3.url), workers=2)
    got = list(loader)
    for maps in got:
        check(maps)
    assert orders(got) == [rows.tolist() for rows in opened(s3.url).order(0)]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 3), (3, 2)])
@pytest.mark.parametrize("stop", [1, 7, 19])
def test_another_goes_on_in_mid_epoch(url, before, after, stop):
    whole = FeatureLoader(opened(url))
    want = [*orders(whole), *orders(whole)]
    first, got = FeatureLoader(opened(url), workers=before), []
    for maps in first:
        got.append(maps.rows.tolist())
        if len(got) == stop:
            break
    state = json.loads(json.dumps(first.state_dict()))
    second = FeatureLoader(opened(url), workers=after)
    second.load_state_dict(state)
    while second.epoch < 2:
        got += orders(second)
    assert got == want


def test_one_that_was_left_goes_on_by_itself(url):
    loader, got = FeatureLoader(opened(url), workers=2), []
    for stop in (3, 5, 100):
        for number, maps in enumerate(loader, 1):
            got.append(maps.rows.tolist())
            if number == stop:
                break
    assert got == [rows.tolist() for rows in opened(url).order(0)]


def test_a_state_of_other_batches_is_refused(url):
    state = FeatureLoader(opened(url)).state_dict()
    for changes in ({"seed": 6}, {"batch": 4}, {"rows": range(20)}, {"window_blocks": 1}, {"layers": ["fine"]}):
        with pytest.raises(IncompatibleError, match="these come in"):
            FeatureLoader(opened(url, **changes)).load_state_dict(state)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_processes_that_train_together_share_an_epoch(url, ranks):
    shares = [opened(url, rank=rank, ranks=ranks).order(0) for rank in range(ranks)]
    assert {len(share) for share in shares} == {-(-IMAGES // BATCH) // ranks}
    rows = [row for share in shares for batch in share for row in batch.tolist()]
    assert len(rows) == len(set(rows)) >= IMAGES - (ranks - 1) * BATCH - BATCH


def first_of_fine(maps):
    return maps.rows, maps.layers["fine"][:, 0, 0].mean((1, 2))


def test_what_a_worker_makes_of_a_batch_is_what_comes(url):
    loader = FeatureLoader(opened(url, transform=first_of_fine), workers=1)
    for rows, means in loader:
        expected = values(0, "fine", rows)[:, 0].mean((1, 2))
        torch.testing.assert_close(means, torch.from_numpy(expected))


def test_forked_workers_are_refused_and_do_not_hang(url):
    loader = DataLoader(opened(url), batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(BadRequestError, match="have to be spawned"):
        next(iter(loader))


def test_a_killed_worker_is_an_error_and_no_hang(url):
    loader = FeatureLoader(opened(url, batch=1), workers=2, prefetch=1)
    batches = iter(loader)
    next(batches)
    children = [one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())]
    os.kill(children[-1].pid, signal.SIGKILL)
    with pytest.raises(StorageError, match="reads batches is gone") as caught:
        list(batches)
    assert "state_dict" in caught.value.hint
    # Where it was is known still.
    again = FeatureLoader(opened(url, batch=1))
    again.load_state_dict(loader.state_dict())
    assert len(list(again)) == IMAGES - loader.done


def test_a_broken_shard_is_said_as_it_is_without_workers(tmp_path):
    fill(str(tmp_path / "s.zarr"))
    shards = sorted((tmp_path / "s.zarr" / "made-up").rglob("fine/c.0.0.0.0"))
    body = bytearray(shards[0].read_bytes())
    body[40] ^= 1
    shards[0].write_bytes(body)
    for workers in (0, 2):
        with pytest.raises(CorruptError) as caught:
            list(FeatureLoader(opened(str(tmp_path / "s.zarr")), workers=workers))
        assert "verify" in str(caught.value.hint)


def test_it_pickles_small(url):
    """What a worker is sent does not grow with layers, beyond their names."""
    assert len(pickle.dumps(opened(url))) < 20 * IMAGES + 20_000


def test_what_cannot_be_is_refused(url, tmp_path):
    with pytest.raises(BadRequestError, match="'fin'"):
        opened(url, layers=["fin"])
    with pytest.raises(BadRequestError, match="row 150 is outside"):
        opened(url, rows=[150])
    for options in ({"batch": 0}, {"window_blocks": 0}, {"ranks": 0}, {"rank": 2, "ranks": 2}):
        with pytest.raises(BadRequestError, match=r"rank|1 or more"):
            opened(url, **options)
    with pytest.raises(BadRequestError, match="at least one run"):
        FeatureDataset([])
    with pytest.raises(BadRequestError, match="0 and 1 are the least"):
        FeatureLoader(opened(url), workers=-1)
    with pytest.raises(BadRequestError, match="neither can be negative"):
        opened(url).set_epoch(-1)
    fill(str(tmp_path / "s.zarr"), committed=100)
    with pytest.raises(NotCommittedError, match="50 of 150 images"):
        opened(str(tmp_path / "s.zarr"))
    assert len(opened(str(tmp_path / "s.zarr"), rows=range(100))) == -(-100 // BATCH)
    assert list(opened(str(tmp_path / "s.zarr"), rows=[])) == []

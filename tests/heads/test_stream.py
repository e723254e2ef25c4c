import threading

import dask.array as da
import numpy as np
import pytest
import torch

from featstore.errors import BadRequestError, NotCommittedError
from featstore.heads import Beside, Features, RunRef
from featstore.heads.stream import Stream, read_maps

IMAGES, BLOCK = 23, 5
SHAPES = {"coarse": (3, 2, 2), "fine": (2, 4, 6)}


def values(run, name):
    count = IMAGES * int(np.prod(SHAPES[name]))
    return (np.arange(count, dtype=np.float32) + 10_000 * run).reshape(IMAGES, *SHAPES[name]).astype(np.float16)


def features(block=BLOCK, runs=2):
    maps = [
        {name: da.from_array(values(k, name), chunks=(block, *shape)) for name, shape in SHAPES.items()}
        for k in range(runs)
    ]
    beside = {"coarse": da.from_array(values(4, "coarse"), chunks=(block, *SHAPES["coarse"]))}
    return Features(maps=maps, beside=[Beside(run=RunRef(name="other"), layers=beside)])


def check(maps, rows, runs=2):
    assert maps.rows.tolist() == list(rows)
    for name in SHAPES:
        want = np.stack([values(k, name)[rows] for k in range(runs)], 1)
        np.testing.assert_array_equal(maps.layers[name].numpy(), want)
    np.testing.assert_array_equal(maps.beside["other/coarse"].numpy(), values(4, "coarse")[rows])


@pytest.mark.parametrize("rows", [[3], [22, 0, 7, 7, 1], [*range(IMAGES)]])
def test_rows_come_in_the_order_asked_for(rows):
    check(read_maps(features(), rows), rows)


@pytest.mark.parametrize("runs", [1, 3])
def test_a_bucket_may_have_fewer_or_more_runs_than_layers(runs):
    check(read_maps(features(runs=runs), [4, 19]), [4, 19], runs)


@pytest.mark.parametrize("window_bytes", [1, 2000, 10**9])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_an_epoch_gives_every_row_once_in_full_batches(window_bytes, batch):
    rows = [r for r in range(IMAGES) if r % 7]
    stream = Stream(features=features(), rows=rows, batch=batch, seed=3, window_bytes=window_bytes)
    batches = list(stream.epoch(0))
    for maps in batches:
        check(maps, maps.rows.tolist())
    seen = np.concatenate([maps.rows for maps in batches])
    assert sorted(seen.tolist()) == rows
    assert [len(maps.rows) for maps in batches[:-1]] == [batch] * (len(batches) - 1)
    assert seen.tolist() != rows


def test_the_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        stream = Stream(features=features(), rows=range(IMAGES), batch=4, seed=seed, window_bytes=1)
        return [maps.rows.tolist() for maps in stream.epoch(epoch)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_no_more_than_two_windows_are_read_ahead_and_blocks_once():
    reads, given = [], threading.Event()

    def block(block_info=None, name="coarse"):
        start, stop = block_info[None]["array-location"][0]
        reads.append(start)
        given.set()
        return values(0, name)[start:stop]

    chunks = ((5, 5, 5, 5, 3), *((n,) for n in SHAPES["coarse"]))
    array = da.map_blocks(block, dtype=np.float16, chunks=chunks, meta=np.empty((0,) * 4, np.float16))
    stream = Stream(features=Features(maps=[{"coarse": array}]), rows=range(IMAGES), batch=5, window_bytes=1)
    batches = stream.epoch(0)
    next(batches)
    assert len(reads) <= 2
    rest = list(batches)
    assert sum(len(maps.rows) for maps in rest) == IMAGES - 5
    assert sorted(reads) == [0, 5, 10, 15, 20]


def test_errors_of_a_read_ahead_arrive_with_their_batch():
    def refuse(block_info=None):
        start, stop = block_info[None]["array-location"][0]
        if start == 10:
            raise NotCommittedError("image 10 was never extracted", hint="extract it")
        return values(0, "coarse")[start:stop]

    chunks = ((5, 5, 5, 5, 3), *((n,) for n in SHAPES["coarse"]))
    array = da.map_blocks(refuse, dtype=np.float16, chunks=chunks, meta=np.empty((0,) * 4, np.float16))
    stream = Stream(features=Features(maps=[{"coarse": array}]), rows=range(IMAGES), batch=5, window_bytes=1)
    with pytest.raises(NotCommittedError, match="never extracted"):
        list(stream.epoch(0))


def test_nan_is_refused_with_its_row():
    broken = values(0, "fine").copy()
    broken[17, 0, 0, 0] = np.nan
    maps = {"fine": da.from_array(broken, chunks=(BLOCK, *SHAPES["fine"]))}
    with pytest.raises(BadRequestError, match="layer fine of run run 0 holds NaN or infinity in rows 17"):
        read_maps(Features(maps=[maps]), range(IMAGES))


def test_a_batch_needs_an_image():
    with pytest.raises(BadRequestError, match="a batch of 0"):
        Stream(features=features(), rows=[1], batch=0)


def test_maps_travel_to_a_device_as_float32():
    maps = read_maps(features(), [2]).to("cpu")
    assert {value.dtype for value in [*maps.layers.values(), *maps.beside.values()]} == {torch.float32}

import itertools

import dask.array as da
import numpy as np
import pytest

from featstore.errors import NotCommittedError
from featstore.heads import Features
from featstore.heads.correspondence_reading import PairReader, visits

SHAPE = (2, 3, 3)
BLOCK, BLOCKS = 4, 6
IMAGES = BLOCK * BLOCKS
ROW_BYTES = 2 * int(np.prod(SHAPE))


def values():
    return np.arange(IMAGES * np.prod(SHAPE), dtype=np.float16).reshape(IMAGES, *SHAPE) % 1000


def features(reads, refuse=None):
    def block(block_info=None):
        start, stop = block_info[None]["array-location"][0]
        reads.append(start // BLOCK)
        if refuse == start // BLOCK:
            raise NotCommittedError(f"image {start} was never extracted", hint="extract it")
        return values()[start:stop]

    chunks = ((BLOCK,) * BLOCKS, *((n,) for n in SHAPE))
    return Features(
        maps=[{"one": da.map_blocks(block, dtype=np.float16, chunks=chunks, meta=np.empty((0,) * 4, "f2"))}]
    )


def all_pairs():
    return np.array(list(itertools.permutations(range(IMAGES), 2)), np.int64)


def read(pairs, window_bytes, seed=0):
    """Pairs in the order they come, blocks in the order they are read; every pair's maps are checked."""
    reads, seen, most = [], [], 0
    reader = PairReader(features=features(reads), window_bytes=window_bytes)
    order = reader.order(pairs, np.random.default_rng(seed))
    for visit, held in reader.read(pairs, order):
        most = max(most, len(held._places))
        for number in visit.pairs:
            maps = held.maps(*pairs[number])
            np.testing.assert_array_equal(maps.layers["one"][:, 0], values()[pairs[number]])
            seen.append(int(number))
    assert sorted(seen) == list(range(len(pairs)))
    return seen, reads, most


def test_with_room_for_all_every_block_is_read_once():
    seen, reads, _ = read(all_pairs(), window_bytes=(BLOCKS + 1) * BLOCK * ROW_BYTES)
    assert sorted(reads) == list(range(BLOCKS))
    assert seen != sorted(seen)


@pytest.mark.parametrize(("room", "most_reads"), [(2, 17), (3, 11), (4, 8), (5, 7)])
def test_a_bounded_number_of_blocks_is_held_and_used_for_as_many_pairs_as_can_be(room, most_reads):
    # all pairs of 6 blocks: 15 pairs of different blocks. With room for r, a read brings r - 1 new pairs of blocks at
    # most, and the first r reads r * (r - 1) / 2: no order needs fewer reads than r + (15 - r(r-1)/2) / (r-1).
    # One read a pair of images would be 552.
    _, reads, most = read(all_pairs(), window_bytes=(room + 1) * BLOCK * ROW_BYTES)
    assert most <= room * BLOCK
    assert len(reads) >= room + (15 - room * (room - 1) / 2) / (room - 1)
    assert len(reads) <= most_reads


def test_the_smallest_window_holds_two_blocks():
    _, reads, most = read(all_pairs(), window_bytes=1)
    assert most == 2 * BLOCK
    assert len(reads) <= 17


@pytest.mark.parametrize("seed", range(5))
def test_categories_that_lie_together_are_read_once_each(seed):
    """Pairs within three groups of two blocks, as of categories: nothing is read twice with room for two."""
    pairs = np.array([pair for pair in all_pairs().tolist() if pair[0] // 8 == pair[1] // 8], np.int64)
    _, reads, _ = read(pairs, window_bytes=1, seed=seed)
    assert sorted(reads) == list(range(BLOCKS))


def test_only_rows_of_pairs_are_held_and_only_their_blocks_read():
    _, reads, most = read(np.array([[0, 9], [9, 1], [0, 1]]), window_bytes=10**6)
    assert sorted(reads) == [0, 2]
    assert most == 3


def test_the_order_depends_on_the_seed_only():
    pairs = all_pairs()
    orders = [read(pairs, 1, seed)[0] for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


@pytest.mark.parametrize("seed", range(20))
def test_every_pair_comes_when_both_its_blocks_are_held(seed):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, rng.integers(1, 12), (rng.integers(1, 60), 2))
    room = int(rng.integers(2, 6))
    held, seen, idle = set(), [], False
    for visit in visits(blocks, room, rng):
        assert not (idle and not len(visit.pairs))  # what was read in vain waits for its partner, and is kept for it
        idle = not len(visit.pairs)
        if visit.drop is not None:
            held.remove(visit.drop)
        assert visit.block not in held
        held.add(visit.block)
        assert len(held) <= room
        assert set(blocks[visit.pairs].reshape(-1)) <= held
        seen += visit.pairs.tolist()
    assert sorted(seen) == list(range(len(blocks)))


def test_no_pairs_are_no_reads():
    assert read(np.empty((0, 2), np.int64), 10**6) == ([], [], 0)


def test_errors_of_a_read_ahead_come_through():
    reader = PairReader(features=features([], refuse=3), window_bytes=1)
    pairs = all_pairs()
    order = reader.order(pairs, np.random.default_rng(0))
    with pytest.raises(NotCommittedError, match="never extracted"):
        list(reader.read(pairs, order))

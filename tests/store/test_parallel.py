"""Work done by several threads: everything once, in order, errors told, no thread left behind."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from featstore.errors import CorruptError
from featstore.store import parallel, shard


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr(parallel, "_processors", lambda: 4)


@pytest.mark.parametrize(
    ("count", "at_least", "sizes"),
    [(10, 1, [3, 3, 3, 1]), (10, 4, [5, 5]), (10, 11, [10]), (3, 1, [1, 1, 1]), (9, 2, [3, 3, 3]), (0, 1, [])],
)
@pytest.mark.usefixtures("four")
def test_shares_are_all_of_it_in_order(count, at_least, sizes):
    found = parallel.shares(range(count), at_least=at_least)
    assert [len(part) for part in found] == sizes
    assert [one for part in found for one in part] == list(range(count))


def test_a_processor_alone_shares_nothing(monkeypatch):
    monkeypatch.setattr(parallel, "_processors", lambda: 1)
    assert parallel.shares(range(10), at_least=1) == [range(10)]


def test_the_first_is_done_here_and_no_thread_stays():
    before = threading.active_count()
    barrier = threading.Barrier(3, timeout=30)  # nobody passes unless all three run at once

    def do(number):
        barrier.wait()
        return number, threading.current_thread() is threading.main_thread()

    assert parallel.side_by_side(do, [5, 6, 7]) == [(5, True), (6, False), (7, False)]
    assert threading.active_count() == before


@pytest.mark.parametrize("bad", [0, 2])
def test_an_error_in_any_share_is_raised(bad):
    def do(number):
        if number == bad:
            raise CorruptError(f"share {number} is damaged")
        return number

    with pytest.raises(CorruptError, match=f"share {bad}"):
        parallel.side_by_side(do, [0, 1, 2])


@pytest.mark.usefixtures("four")
def test_large_maps_are_read_by_several_threads(tmp_path, lab, monkeypatch):
    monkeypatch.setattr(shard, "_SHARE_BYTES", 1)
    _, run = lab.start(tmp_path / "s", 12, layers={"wide": (3, 300, 301)})
    values = np.random.default_rng(1).standard_normal((12, 3, 300, 301)).astype(np.float16)
    run.write_block(0, range(12), {"wide": values})
    names = set()
    original = shard._read_one

    def read_one(*arguments):
        names.add(threading.current_thread().name.split("_")[0])
        return original(*arguments)

    monkeypatch.setattr(shard, "_read_one", read_one)
    rows = [11, 3, 4, 0, 7, 9, 1]
    np.testing.assert_array_equal(run.numpy("wide", rows), values[rows])
    assert names == {"MainThread", "featstore-share"}
    path = tmp_path / "s" / run.path / "wide" / "c.0.0.0.0"
    data = bytearray(path.read_bytes())
    data[10 * 541_804 + 17] ^= 4  # the eleventh image, which the last thread reads
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"'img0010'.*crc32c"):
        run.numpy("wide", range(12))

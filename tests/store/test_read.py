"""Reading through featstore itself."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys

import dask
import dask.array
import numpy as np
import pytest
import torch

import featstore.store as fs
from featstore.errors import BadRequestError, CorruptError, NotCommittedError, NotFoundError
from featstore.store.local import LocalObjects, LocalSnapshot


@pytest.fixture
def filled(tmp_path, lab):
    lab.full(tmp_path / "s", 150)
    run = fs.open(tmp_path / "s").dataset("toy").run("controlnet:canny+lora")
    return run, {layer: lab.maps_of(run, range(150), layer) for layer in lab.LAYERS}


def test_rows_in_any_order(filled):
    run, want = filled
    rows = [149, 0, 64, 63, 64, 1]
    for layer, values in want.items():
        np.testing.assert_array_equal(run.numpy(layer, rows), values[rows])
        got = run.torch(layer, np.array(rows))
        assert isinstance(got, torch.Tensor)
        assert got.dtype == torch.float16
        np.testing.assert_array_equal(got.numpy(), values[rows])
    assert run.numpy("up1", []).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("rows", [[150], [-1], [0.5], [[0, 1]], ["a"], [True]])
def test_rows_that_cannot_be(filled, rows):
    with pytest.raises(BadRequestError):
        filled[0].numpy("up1", rows)


def test_dask_array_is_one_task_a_block(filled):
    run, want = filled
    for layer, values in want.items():
        array = run[layer]
        assert isinstance(array, dask.array.Array)
        assert array.chunks == ((64, 64, 22), *((n,) for n in values.shape[1:]))
        assert array.dtype == values.dtype
        assert len(array.__dask_graph__()) == 3
        with dask.config.set(scheduler="threads"):
            np.testing.assert_array_equal(array.compute(), values)
            np.testing.assert_array_equal(array[[5, 140, 70]].compute(), values[[5, 140, 70]])
        np.testing.assert_allclose(
            array.astype("f4").mean(axis=(0, 2, 3)).compute(), values.astype("f8").mean(axis=(0, 2, 3)), atol=1e-5
        )
        assert array.name == run[layer].name
        copy = pickle.loads(pickle.dumps(array))
        np.testing.assert_array_equal(copy.compute(scheduler="sync"), values)


def test_blocks_cover_every_row_once_and_shuffle_by_seed(filled):
    run, want = filled
    layers = list(want)
    plain = [(rows.tolist(), maps) for rows, maps in run.blocks(layers)]
    assert [row for rows, _ in plain for row in rows] == list(range(150))
    for rows, maps in plain:
        for layer in layers:
            np.testing.assert_array_equal(maps[layer], want[layer][rows])
    shuffled = [(rows.tolist(), maps["up1"]) for rows, maps in run.blocks(["up1"], seed=1)]
    order = [row for rows, _ in shuffled for row in rows]
    assert sorted(order) == list(range(150))
    assert order != list(range(150))
    for rows, maps in shuffled:
        assert len({row // 64 for row in rows}) == 1
        np.testing.assert_array_equal(maps, want["up1"][rows])
    assert order == [row for rows, _ in run.blocks(["up1"], seed=1) for row in rows.tolist()]
    some = [rows.tolist() for rows, _ in run.blocks(["up1"], rows=[70, 3, 140])]
    assert some == [[3], [70], [140]]


def test_absent_rows_are_refused_by_name(tmp_path, lab):
    _, run = lab.start(tmp_path / "s", 100)
    lab.fill(run, rows=set(range(100)) - {7, 66, 67, 68, 69})
    np.testing.assert_array_equal(run.numpy("up1", [6, 8]), lab.maps_of(run, [6, 8], "up1"))
    with pytest.raises(NotCommittedError, match=r"'img0007'.*1 absent") as caught:
        run.numpy("up1", [6, 7])
    assert caught.value.hint == (
        "featstore extract --dataset toy --model reference "
        "--techniques controlnet:canny+lora --timesteps 50 --layers up1"
    )
    with pytest.raises(NotCommittedError, match=r"'img0066', 'img0067', 'img0068' and 1 more.*4 absent"):
        run["up1"].compute(scheduler="sync")
    with pytest.raises(NotCommittedError):
        list(run.blocks(["up1"]))
    assert run.valid(list(lab.LAYERS)).tolist() == [row not in (7, 66, 67, 68, 69) for row in range(100)]


def test_stale_rows_are_refused_and_valid_again_with_the_old_image(tmp_path, lab):
    store, _ = lab.full(tmp_path / "s", 10)
    store.put_samples("toy", lab.table(10, changed=[4]), source="made up")
    run = store.dataset("toy").runs()[0]
    assert run.valid(["up1"]).tolist() == [row != 4 for row in range(10)]
    assert run.committed("up1")[4] == int(lab.digest(4)[:16], 16)
    with pytest.raises(NotCommittedError, match=r"'img0004'.*1 stale"):
        run.numpy("up1", range(10))
    with pytest.raises(NotCommittedError, match="stale"):
        run["up1"].compute(scheduler="sync")
    store.put_samples("toy", lab.table(10), source="made up")
    assert store.dataset("toy").runs()[0].valid(list(lab.LAYERS)).all()


def test_unknown_layer_names_the_nearest(filled):
    run, _ = filled
    with pytest.raises(NotCommittedError, match="unknown layer 'up2'; known: attn-up-cross-2, up1"):
        run["up2"]
    assert not run.valid(["up1", "up2"]).any()
    with pytest.raises(NotFoundError):
        run.committed("nothing")


def test_planning_imports_nothing_heavy(tmp_path, lab):
    lab.full(tmp_path / "s", 10)
    script = f"""
import sys
import featstore
store = featstore.open({str(tmp_path / "s")!r})
run = store.dataset("toy").run("controlnet:canny+lora")
assert store.dataset("toy").find(run.recipe).path == run.path
assert run.valid(["up1"]).all() and run.committed("up1").all()
assert run.numpy("up1", [0]).shape == (1, 3, 4, 4)
store = featstore.create({str(tmp_path / "s")!r})
store.put_samples("toy", store.dataset("toy").samples, source="made up")
heavy = {{"torch", "zarr", "dask", "diffusers", "transformers", "tensorstore"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_reading_never_writes(tmp_path, lab):
    lab.full(tmp_path / "s", 10)

    def state():
        return {str(p): p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")}

    before = state()
    run = fs.open(tmp_path / "s").dataset("toy").runs()[0]
    run["up1"].compute(scheduler="sync")
    run.valid(["up1"])
    assert state() == before


def test_chosen_rows_are_lazy_and_need_no_neighbours(tmp_path, lab):
    _, run = lab.start(tmp_path / "s.zarr", 100)
    rows = [1, 5, 6, 63, 99]
    lab.fill(run, rows=rows)
    layer = next(iter(run.layers))
    chosen = np.isin(np.arange(100), rows)
    lazy = run.lazy(layer, chosen)
    assert lazy.chunks == run[layer].chunks
    values = lazy.compute()
    np.testing.assert_array_equal(values[chosen], run.numpy(layer, rows))
    assert np.isnan(values[~chosen]).all()
    chosen[2] = True
    with pytest.raises(NotCommittedError):
        run.lazy(layer, chosen).compute()
    with pytest.raises(BadRequestError, match="100 rows"):
        run.lazy(layer, chosen[:50])


IMAGE = 3 * 4 * 4 * 2 + 4
"""Bytes of a map of ``up1`` with its checksum."""


@pytest.mark.parametrize(
    ("file", "at"),
    [
        ("up1/c.0.0.0.0", 5 * IMAGE + 17),
        ("up1/c.0.0.0.0", 6 * IMAGE - 1),  # the map's checksum
        ("up1/c.0.0.0.0", -4 - 16 * 64 + 16 * 5 + 2),  # its offset
        ("up1/c.0.0.0.0", -1),  # the checksum of the offsets
        ("committed/up1/c.0", 5 * 8),
        ("committed/up1/c.0", -2),
    ],
)
def test_a_reader_that_lives_long_finds_a_bit_that_flips_later(filled, tmp_path, file, at):
    run, want = filled
    np.testing.assert_array_equal(run.numpy("up1", [5]), want["up1"][[5]])
    path = tmp_path / "s" / run.path / file
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 8
    with path.open("r+b") as disk:
        disk.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # A bit that rots tells nobody when.
    with pytest.raises(CorruptError, match="damaged"):
        run.numpy("up1", [5])
    data[at] ^= 8
    path.write_bytes(data)
    np.testing.assert_array_equal(run.numpy("up1", [5]), want["up1"][[5]])


WIDE = (3, 300, 301)
WIDE_BYTES = 3 * 300 * 301 * 2


@pytest.fixture
def wide(tmp_path, lab):
    """A run of maps that are read in several pieces, the last of them short."""
    _, run = lab.start(tmp_path / "s", 5, layers={"wide": WIDE})
    values = np.random.default_rng(0).standard_normal((5, *WIDE)).astype(np.float16)
    run.write_block(0, range(5), {"wide": values})
    assert 2 * LocalSnapshot.piece_bytes < WIDE_BYTES < 3 * LocalSnapshot.piece_bytes
    return run, values


def test_large_maps_are_read_in_pieces(wide):
    run, values = wide
    np.testing.assert_array_equal(run.numpy("wide", [3, 0, 4, 3]), values[[3, 0, 4, 3]])
    np.testing.assert_array_equal(run["wide"].compute(scheduler="sync"), values)


@pytest.mark.parametrize(
    "at", [0, LocalSnapshot.piece_bytes - 1, LocalSnapshot.piece_bytes, WIDE_BYTES - 1, WIDE_BYTES]
)
def test_a_bit_flipped_in_any_piece_is_found(wide, tmp_path, at):
    run, values = wide
    path = tmp_path / "s" / run.path / "wide" / "c.0.0.0.0"
    data = bytearray(path.read_bytes())
    data[2 * (WIDE_BYTES + 4) + at] ^= 1
    path.write_bytes(data)
    for rows in ([2], [1, 2, 3]):
        with pytest.raises(CorruptError, match=r"'img0002'.*crc32c"):
            run.numpy("wide", rows)
    np.testing.assert_array_equal(run.numpy("wide", [1, 3]), values[[1, 3]])


def test_where_reads_are_requests_a_block_is_one(filled):
    """Images that lie one after the other are one extent, and all extents go out together."""
    run, want = filled
    asked = []

    class Requests(LocalSnapshot):
        piece_bytes = None

        def read_many(self, extents):
            asked.append(len(extents))
            super().read_many(extents)

    class Far(LocalObjects):
        def open(self, key):
            return Requests(str(self.root / key))

    reader = run.reader("up1")
    far = dataclasses.replace(reader, objects=Far(reader.objects.root))
    rows = [*range(10, 20), 3, 40, 41]
    np.testing.assert_array_equal(far.rows(rows), want["up1"][rows])
    np.testing.assert_array_equal(far.rows(range(150)), want["up1"])
    assert asked == [3, 1, 1, 1]


def test_reads_that_the_kernel_cuts_short_are_taken_up_again(wide, monkeypatch):
    run, values = wide
    cut = []

    def preadv(fd, buffers, offset, original=os.preadv):
        whole = memoryview(buffers[0])
        cut.append(len(whole) > 4096)
        return original(fd, [whole[: len(whole) // 2]] if cut[-1] else buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    np.testing.assert_array_equal(run.numpy("wide", [3]), values[[3]])
    np.testing.assert_array_equal(run.numpy("wide", [0, 1, 2]), values[:3])
    # Four samples of 541,800 bytes, each halved at least seven times before a read is left whole.
    assert sum(cut) >= 4 * 7

"""int8 layers: maps and their scales in two arrays, which never come apart."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import tensorstore
import zarr

import featstore.store as fs
from featstore.errors import BadRequestError, CorruptError, NotCommittedError, StorageError
from featstore.store import layout
from featstore.store import precision as precisions
from featstore.store.local import LocalObjects
from featstore.store.precision import Quantised, quantise
from featstore.store.verify import verify
from featstore.store.write import uncommit

SHAPE = (3, 4, 4)
LAYERS = {"up1": SHAPE}


def floats(run, rows, version=0):
    """Maps whose values say whose they are."""
    keys = [int(run.dataset.samples.digests[row][:8], 16) + version for row in rows]
    return np.stack([np.random.default_rng(key).standard_normal(SHAPE, dtype=np.float32) for key in keys])


def write(run, rows, version=0):
    """Write rows of block 0."""
    return run.write_block(0, rows, {"up1": quantise(floats(run, rows, version))})


def expected(run, rows, version=0):
    stored = quantise(floats(run, rows, version))
    return (stored.values * stored.scales[:, :, None, None]).astype(np.float16)


@pytest.fixture
def run(tmp_path, lab):
    _, run = lab.start(tmp_path / "s", 10, layers=LAYERS, precision="int8")
    return run


def scales_file(run):
    return run.dataset.objects.root / run.path / "scales" / "up1" / "c.0.0"


def maps_file(run):
    return run.dataset.objects.root / run.path / "up1" / "c.0.0.0.0"


def with_tensorstore(path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, read=True).result().read().result()


def test_other_readers_open_both_arrays(run):
    write(run, [1, 4, 9])
    root = run.dataset.objects.root / run.path
    q, scales = zarr.open_array(root / "up1", mode="r"), zarr.open_array(root / "scales" / "up1", mode="r")
    assert (q.dtype, q.shape, q.fill_value) == (np.int8, (10, *SHAPE), 0)
    assert (scales.dtype, scales.shape) == (np.float32, (10, 3))
    assert (scales.shards, scales.chunks) == ((64, 3), (1, 3))
    assert scales.metadata.dimension_names == ("image", "channel")
    np.testing.assert_array_equal(with_tensorstore(root / "up1"), q[:])
    np.testing.assert_array_equal(with_tensorstore(root / "scales" / "up1"), scales[:])
    there = np.isin(np.arange(10), [1, 4, 9])
    assert np.isnan(scales[:][~there]).all()
    product = (q[:] * scales[:][:, :, None, None]).astype(np.float16)
    np.testing.assert_array_equal(product[there], run.numpy("up1", [1, 4, 9]))
    assert np.isnan(product[~there]).all()
    group = zarr.open_group(root, mode="r")
    assert set(dict(group["scales"].arrays())) == {"up1"}


def test_every_way_of_reading_gives_the_product_as_float16(run):
    write(run, range(10))
    want = expected(run, range(10))
    assert (run.layers["up1"].dtype, run.layers["up1"].read_dtype) == (np.int8, np.float16)
    np.testing.assert_array_equal(run.numpy("up1", [7, 0, 7]), want[[7, 0, 7]])
    assert run.torch("up1", [2]).numpy().tobytes() == want[[2]].tobytes()
    lazy = run["up1"]
    assert lazy.dtype == np.float16
    np.testing.assert_array_equal(lazy.compute(scheduler="sync"), want)
    chosen = np.arange(10) % 3 == 0
    some = run.lazy("up1", chosen).compute(scheduler="sync")
    np.testing.assert_array_equal(some[chosen], want[chosen])
    assert np.isnan(some[~chosen]).all()
    ((rows, maps),) = run.blocks(["up1"])
    np.testing.assert_array_equal(maps["up1"], want[rows])
    reader = pickle.loads(pickle.dumps(run.reader("up1")))
    np.testing.assert_array_equal(reader.block(0), want)
    assert reader.rows([]).shape == (0, *SHAPE)


def test_what_lies_on_disk_is_what_is_copied(run, tmp_path, lab):
    write(run, range(10))
    stored = run.reader("up1").stored([3, 5])
    assert isinstance(stored, Quantised)
    _, other = lab.start(tmp_path / "t", 10, layers=LAYERS, precision="int8")
    other.write_block(0, [3, 5], {"up1": stored})
    np.testing.assert_array_equal(other.numpy("up1", [3, 5]), expected(run, [3, 5]))


def test_sizes_count_the_scales(run):
    written = write(run, range(10))
    assert run.layer_bytes("up1") == maps_file(run).stat().st_size + scales_file(run).stat().st_size
    assert run.layer_bytes("up1") == written - (64 * 8 + 4)
    assert run.layers["up1"].image_bytes == 48
    assert run.layers["up1"].stored_bytes == 48 + 12
    assert layout.layer_shards(run.path, "up1", 2, np.int8) == (
        f"{run.path}/up1/c.2.0.0.0",
        f"{run.path}/scales/up1/c.2.0",
    )
    assert layout.layer_shards(run.path, "up1", 2, np.float16) == (f"{run.path}/up1/c.2.0.0.0",)


def test_rows_written_in_pieces_equal_a_block_written_at_once(run, tmp_path, lab):
    _, other = lab.start(tmp_path / "t", 10, layers=LAYERS, precision="int8")
    write(run, range(10))
    for rows in ([8, 9], [0, 1, 2], range(10)):
        write(other, rows)
    assert scales_file(run).read_bytes() == scales_file(other).read_bytes()
    assert maps_file(run).read_bytes() == maps_file(other).read_bytes()
    before = maps_file(run).read_bytes()
    assert write(run, range(10), version=1) == 0  # valid rows stay as they are
    assert maps_file(run).read_bytes() == before


def test_the_scales_grow_with_the_table(run, lab):
    write(run, range(10))
    store = fs.create(run.dataset.objects.root)
    store.put_samples("toy", lab.table(100), source="made up")
    assert zarr.open_array(run.dataset.objects.root / run.path / "scales" / "up1", mode="r").shape == (100, 3)


@pytest.mark.parametrize(
    "maps",
    [
        np.zeros((2, *SHAPE), dtype=np.int8),
        np.zeros((2, *SHAPE), dtype=np.float16),
        Quantised(np.zeros((2, *SHAPE), dtype=np.int8), np.zeros((2, 4), dtype=np.float32)),
        Quantised(np.zeros((2, *SHAPE), dtype=np.int8), np.full((2, 3), -1, dtype=np.float32)),
        Quantised(np.zeros((2, *SHAPE), dtype=np.int8), np.full((2, 3), np.nan, dtype=np.float32)),
        Quantised(np.zeros((2, *SHAPE), dtype=np.int8), np.full((2, 3), 1e4, dtype=np.float32)),
        Quantised(np.zeros((2, 4, 4, 4), dtype=np.int8), np.zeros((2, 3), dtype=np.float32)),
    ],
)
def test_maps_that_do_not_fit_are_refused(run, maps):
    with pytest.raises(BadRequestError, match="layer 'up1'"):
        run.write_block(0, [1, 2], {"up1": maps})
    assert not run.committed("up1").any()


def test_float_layers_take_no_scales(tmp_path, lab):
    _, run = lab.start(tmp_path / "f", 10, layers=LAYERS)
    with pytest.raises(BadRequestError, match="are wanted"):
        run.write_block(0, [1], {"up1": quantise(floats(run, [1]))})


def test_every_flipped_bit_of_scales_is_refused_or_harmless(run):
    write(run, range(10))
    want, whole = expected(run, range(10)), scales_file(run).read_bytes()
    rng = np.random.default_rng(0)
    outcomes = {"refused": 0, "unchanged": 0}
    for place, byte in enumerate(whole):
        broken = bytearray(whole)
        broken[place] = byte ^ (1 << int(rng.integers(8)))
        scales_file(run).write_bytes(broken)
        for row in range(10):
            try:
                read = run.numpy("up1", [row])
            except CorruptError as error:
                outcomes["refused"] += "scales" in str(error)
            else:
                np.testing.assert_array_equal(read[0], want[row])
                outcomes["unchanged"] += 1
    # A row's own 20 bytes break that row, the index and its crc32c break all.
    assert outcomes["refused"] == 10 * 20 + 10 * (64 * 16 + 4)


def test_verify_finds_what_is_wrong_with_scales_and_repairs_by_uncommitting(run, tmp_path, lab):
    write(run, range(10))
    root = run.dataset.objects.root
    data = bytearray(scales_file(run).read_bytes())
    data[20 * 4 + 1] ^= 8
    scales_file(run).write_bytes(data)
    report = verify(fs.create(root))
    assert not report.ok
    assert [text for text in report.corrupt if "img0004" in text and "its scales do not match their crc32c" in text]
    assert report.checked_bytes == 10 * 60
    verify(fs.create(root), repair=True)
    run = fs.create(root).dataset("toy").runs()[0]
    assert np.flatnonzero(~run.valid(["up1"])).tolist() == [4]
    write(run, [4])
    assert verify(fs.open(root)).ok
    np.testing.assert_array_equal(run.numpy("up1", range(10)), expected(run, range(10)))
    scales_file(run).unlink()
    with pytest.raises(CorruptError, match="the shard of its scales is gone"):
        run.numpy("up1", [1])
    assert verify(fs.create(root), repair=True).repaired == 10
    write(run, range(10))
    assert verify(fs.open(root)).ok


@pytest.mark.parametrize("value", [np.nan, -0.5, np.inf, 600.0])
def test_scales_that_no_writer_stores_are_refused(run, value, monkeypatch):
    monkeypatch.setattr(precisions, "sound", lambda scales: np.ones(scales.shape, dtype=bool))
    bad = quantise(floats(run, [2, 3]))
    bad.scales[1, 1] = value
    run.write_block(0, [2, 3], {"up1": bad})
    with pytest.raises(CorruptError, match="negative, not finite, or beyond float16"):
        run.numpy("up1", [3])
    np.testing.assert_array_equal(run.numpy("up1", [2]), expected(run, [2]))
    assert any("img0003" in text for text in verify(fs.open(run.dataset.objects.root)).corrupt)


def test_a_map_beside_the_scales_of_another_is_damage(run, tmp_path, lab):
    _, other = lab.start(tmp_path / "t", 10, layers=LAYERS, precision="int8")
    write(run, [1, 2])
    write(other, [1])
    write(other, [2], version=1)
    scales_file(run).write_bytes(scales_file(other).read_bytes())
    np.testing.assert_array_equal(run.numpy("up1", [1]), expected(run, [1]))
    with pytest.raises(CorruptError, match="its scales belong to another map"):
        run.numpy("up1", [2])
    with pytest.raises(CorruptError, match="place 2 of the block: its scales belong to another map"):
        write(run, [5])
    write(run, [2, 5], version=1)
    np.testing.assert_array_equal(run.numpy("up1", [2, 5]), expected(run, [2, 5], version=1))


class Meddling(LocalObjects):
    """Does something once, right before the scales are read."""

    meddle = None

    def get(self, key, *, max_bytes=None):
        if "/scales/up1/c." in key and self.meddle is not None:
            meddle, self.meddle = self.meddle, None
            meddle()
        return super().get(key, max_bytes=max_bytes)


def test_a_reader_never_joins_a_map_of_before_and_scales_of_after(run):
    """Between its looks at the two objects a row is uncommitted and written anew, its record as before."""
    write(run, range(10))
    objects = Meddling(run.dataset.objects.root)

    def rewrite():
        record = run.committed("up1")
        uncommit(run.dataset.objects, run.path, "up1", 0, run.block_length, {3: int(record[3])})
        write(run, [3], version=1)

    reader = pickle.loads(pickle.dumps(run.reader("up1")))
    object.__setattr__(reader, "objects", objects)
    objects.meddle = rewrite
    np.testing.assert_array_equal(reader.rows([3, 4]), np.stack([*expected(run, [3], 1), *expected(run, [4])]))


def test_a_reader_refuses_rows_that_change_under_it(run, lab):
    write(run, range(10))
    objects = Meddling(run.dataset.objects.root)

    def change():
        store = fs.create(run.dataset.objects.root)
        store.put_samples("toy", lab.table(10, changed=[3]), source="made up")
        write(store.dataset("toy").runs()[0], [3])

    reader = run.reader("up1")
    object.__setattr__(reader, "objects", objects)
    objects.meddle = change
    with pytest.raises(NotCommittedError, match="img0003"):
        reader.rows([3, 4])


class Failing(LocalObjects):
    """Fails at its n-th put, before or after it happened."""

    left = -1
    after = False

    def put(self, key, *buffers, durable=True):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise StorageError("cut")
        written = super().put(key, *buffers, durable=durable)
        if self.left == 0:
            raise StorageError("cut")
        return written


def cut(lab, root, step, *, after):
    """A block of valid, stale and absent rows is completed by a writer that is cut off at its ``step``-th put.

    Whether it was; what holds in either case is checked.
    """
    _, run = lab.start(root, 10, layers=LAYERS, precision="int8")
    write(run, range(8))
    fs.create(root).put_samples("toy", lab.table(10, changed=[2]), source="made up")
    run = fs.create(root).dataset("toy").runs()[0]
    run.reader("up1")
    objects, run.dataset.objects = run.dataset.objects, Failing(root)
    run.dataset.objects.left, run.dataset.objects.after = step, after
    was_cut = False
    try:
        write(run, [2, 8, 9])
    except StorageError:
        was_cut = True
    run.dataset.objects = objects
    there = np.flatnonzero(run.valid(["up1"]))
    assert set(there) >= set(range(8)) - {2}
    np.testing.assert_array_equal(run.numpy("up1", there), expected(run, there))
    write(run, [2, 8, 9])
    np.testing.assert_array_equal(run.numpy("up1", range(10)), expected(run, range(10)))
    assert verify(fs.open(root)).ok
    return was_cut


@pytest.mark.parametrize("after", [False, True])
def test_cut_at_every_put_what_is_committed_is_true(tmp_path, lab, after):
    steps = 1
    while cut(lab, tmp_path / str(steps), steps, after=after):
        steps += 1
    assert steps > 4  # a record, maps, scales and the record again at least

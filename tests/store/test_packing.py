"""``--compress``: maps behind zstd are the same maps, in whatever reader and at whatever fault."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tensorstore
import zarr

import featstore.store as fs
from featstore.errors import CorruptError
from featstore.store import packing, shard
from featstore.store.digest import run_digest
from featstore.store.precision import Quantised
from featstore.store.verify import verify

PRECISIONS = ("float16", "float32", "int8")
LAYERS = {"up1": (3, 16, 16)}


def smooth(run, rows):
    """Maps that zstd makes smaller."""
    steps = np.arange(16, dtype=np.float32) // 4
    one = np.stack([steps[:, None] + steps * (channel + 1) for channel in range(3)])
    return np.stack([one * (row + 1) for row in rows]).astype(np.float32)


def stored(run, rows):
    from featstore.store.precision import encoded

    return {"up1": encoded(smooth(run, rows), run.recipe.precision)}


def start(root, lab, precision="float16", compress=True):
    store = fs.create(root)
    dataset = store.put_samples("toy", lab.table(10), source="made up")
    options = {"batch_size": 8, "provenance": {}, "compress": compress}
    return dataset.create_run(lab.recipe(precision=precision), LAYERS, **options)


@pytest.fixture(params=PRECISIONS)
def pair(request, tmp_path, lab):
    """The same features, packed and as they are."""
    runs = start(tmp_path / "s", lab, request.param), start(tmp_path / "t", lab, request.param, compress=False)
    for run in runs:
        run.write_block(0, range(10), stored(run, range(10)))
    return runs


def parts(maps):
    return (maps.values, maps.scales) if isinstance(maps, Quantised) else (maps,)


def maps_file(run):
    return run.dataset.objects.root / run.path / "up1" / "c.0.0.0.0"


def test_packed_features_are_the_same_and_smaller(pair):
    packed, plain = pair
    assert (packed.compressed, plain.compressed) == (True, False)
    assert packed.fingerprint == plain.fingerprint
    rows = [7, 0, 9, 7]
    np.testing.assert_array_equal(packed.numpy("up1", rows), plain.numpy("up1", rows))
    np.testing.assert_array_equal(packed["up1"].compute(scheduler="sync"), plain["up1"].compute(scheduler="sync"))
    for ours, theirs in zip(*(parts(run.reader("up1").stored(rows)) for run in pair), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert maps_file(packed).stat().st_size < 0.7 * maps_file(plain).stat().st_size
    assert packed.layer_bytes("up1") < plain.layer_bytes("up1")
    assert verify(fs.open(packed.dataset.objects.root)).ok


def test_other_readers_unpack_them(pair):
    packed, _ = pair
    arrays = [zarr.open_array(run.dataset.objects.root / run.path / "up1", mode="r") for run in pair]
    np.testing.assert_array_equal(arrays[0][:], arrays[1][:])
    np.testing.assert_array_equal(arrays[0][4], arrays[1][4])
    path = packed.dataset.objects.root / packed.path / "up1"
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    np.testing.assert_array_equal(tensorstore.open(spec, read=True).result().read().result(), arrays[1][:])


def test_both_have_the_digest_of_what_they_hold(pair):
    packed, plain = pair
    assert run_digest(packed) == run_digest(plain)
    packed.dataset.objects.delete(f"{packed.path}/up1/c.0.0.0.0")
    assert run_digest(packed) != run_digest(plain)


def test_rows_written_in_pieces_equal_a_block_written_at_once(pair, tmp_path, lab):
    packed, _ = pair
    other = start(tmp_path / "u", lab, packed.recipe.precision)
    for rows in ([8, 9], [0, 1, 2], range(10)):
        other.write_block(0, rows, stored(other, rows))
    assert maps_file(other).read_bytes() == maps_file(packed).read_bytes()
    assert other.write_block(0, range(10), stored(other, range(10))) == 0


def test_a_run_stays_as_it_was_created(tmp_path, lab):
    for compress in (True, False):
        root = tmp_path / str(compress)
        start(root, lab, compress=compress)
        assert start(root, lab, compress=not compress).compressed is compress


def test_a_run_that_is_adopted_stays_packed(pair, tmp_path, lab):
    for run in pair:
        store = fs.create(tmp_path / f"adopted-{run.compressed}")
        dataset = store.put_samples("toy", lab.table(10), source="made up")
        here = dataset.adopt(run, ["up1"])
        here.write_block(0, range(10), {"up1": run.reader("up1").stored(range(10))})
        assert here.compressed is run.compressed
        assert maps_file(here).read_bytes() == maps_file(run).read_bytes()


def test_every_flipped_bit_is_refused_or_harmless(tmp_path, lab):
    run = start(tmp_path / "s", lab)
    run.write_block(0, [1, 4], stored(run, [1, 4]))
    want, whole = run.numpy("up1", [1, 4]), maps_file(run).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place, byte in enumerate(whole):
        broken = bytearray(whole)
        broken[place] = byte ^ (1 << int(rng.integers(8)))
        maps_file(run).write_bytes(broken)
        for number, row in enumerate((1, 4)):
            try:
                read = run.numpy("up1", [row])
            except CorruptError:
                refused += 1
            else:
                np.testing.assert_array_equal(read[0], want[number])
    # A row's own bytes break that row, what stands behind the images breaks both.
    body = len(whole) - len(b"".join(shard.tail(np.zeros(64, "<u8"), np.zeros((64, 2), "<u8"), "k")))
    assert refused == body + 2 * (len(whole) - body)


def test_a_frame_of_another_map_is_found_and_repaired(tmp_path, lab):
    run = start(tmp_path / "s", lab)
    run.write_block(0, range(10), stored(run, range(10)))
    key = f"{run.path}/up1/c.0.0.0.0"
    record = np.zeros(64, dtype=np.uint64)
    record[:10] = run.committed("up1")
    frames, seals, wrong = packing.read_packed(run.dataset.objects, key, record, range(10))
    assert wrong == {}
    shorter = packing.pack(memoryview(bytes(100)))
    longer = packing.pack(memoryview(bytes(10_000)))
    # A frame that does not say how much it unpacks to: 128 KiB a block of 4 bytes.
    bomb = b"\x28\xb5\x2f\xfd\x00\x38" + ((1 << 20) + 2).to_bytes(3, "little").join([b"", *[b"A"] * 1000])
    forged = frames | {2: frames[3], 5: shorter, 6: longer, 7: memoryview(bomb), 8: memoryview(b"no frame at all")}
    run.dataset.objects.put(key, *packing.encode(forged, seals, record, key))
    for row in (2, 5, 6, 7, 8):
        with pytest.raises(CorruptError, match="does not unpack to the map"):
            run.numpy("up1", [row])
    np.testing.assert_array_equal(run.numpy("up1", [3, 9]), smooth(run, [3, 9]).astype(np.float16))
    root = run.dataset.objects.root
    assert len(verify(fs.open(root)).corrupt) == 1
    verify(fs.create(root), repair=True)
    run = fs.create(root).dataset("toy").open_run(run.path)
    assert np.flatnonzero(~run.valid(["up1"])).tolist() == [2, 5, 6, 7, 8]
    run.write_block(0, [2, 5, 6, 7, 8], stored(run, [2, 5, 6, 7, 8]))
    assert verify(fs.open(root)).ok


def test_readers_travel(pair):
    packed, _ = pair
    reader = packed.reader("up1")
    assert reader.packed
    broken = dataclasses.replace(reader, packed=False)
    with pytest.raises(CorruptError):
        broken.rows([1])


@pytest.mark.parametrize("value", [None, "yes", 1, False])
def test_a_document_that_says_otherwise_is_noticed(tmp_path, lab, value):
    from featstore.store import metadata

    run = start(tmp_path / "s", lab)
    run.write_block(0, [1], stored(run, [1]))
    file = run.dataset.objects.root / run.path / "zarr.json"
    document = json.loads(file.read_bytes())
    document["attributes"]["featstore"]["compressed"] = value
    file.write_bytes(metadata.seal(document))
    with pytest.raises(CorruptError):
        fs.open(run.dataset.objects.root).dataset("toy").open_run(run.path).numpy("up1", [1])

"""What other zarr readers make of the files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

import featstore.store as fs


def expected(lab, n, layer, changed=(), dtype=np.float16):
    digests = [lab.digest(i, int(i in changed)) for i in range(n)]
    return np.stack([lab.map_of(int(d[:16], 16), layer, dtype) for d in digests])


def with_tensorstore(path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return tensorstore.open(spec, read=True).result()


@pytest.mark.parametrize("precision", ["float16", "float32"])
@pytest.mark.parametrize("n", [1, 64, 100])
def test_zarr_python_and_tensorstore_read_every_array(tmp_path, lab, n, precision):
    _, run = lab.full(tmp_path / "s", n, precision=precision)
    for layer, shape in lab.LAYERS.items():
        want = expected(lab, n, layer, dtype=precision)
        path = tmp_path / "s" / run.path / layer
        array = zarr.open_array(path, mode="r")
        assert array.shape == (n, *shape)
        assert array.dtype == precision
        assert array.metadata.dimension_names == ("image", "channel", "y", "x")
        assert (array.shards, array.chunks) == ((64, *shape), (1, *shape))
        np.testing.assert_array_equal(array[:], want)
        np.testing.assert_array_equal(array[n - 1], want[n - 1])
        np.testing.assert_array_equal(with_tensorstore(path).read().result(), want)
        record = tmp_path / "s" / run.path / "committed" / layer
        digests = [int(lab.digest(i)[:16], 16) for i in range(n)]
        np.testing.assert_array_equal(zarr.open_array(record, mode="r")[:], np.array(digests, dtype=np.uint64))
        np.testing.assert_array_equal(with_tensorstore(record).read().result(), np.array(digests, dtype=np.uint64))


def test_absent_rows_read_as_nan_and_never_as_zeros(tmp_path, lab):
    _, run = lab.start(tmp_path / "s", 100)
    lab.fill(run, rows=[3, 5])
    for layer in lab.LAYERS:
        path = tmp_path / "s" / run.path / layer
        for values in (zarr.open_array(path, mode="r")[:], with_tensorstore(path).read().result()):
            there = np.isin(np.arange(100), [3, 5])
            assert np.isnan(values[~there]).all()
            np.testing.assert_array_equal(values[there], expected(lab, 100, layer)[there])


def test_a_map_of_zeros_is_stored(tmp_path, lab):
    _, run = lab.start(tmp_path / "s", 2, layers={"up1": (3, 4, 4)})
    run.write_block(0, [0], {"up1": np.zeros((1, 3, 4, 4), dtype=np.float16)})
    values = zarr.open_array(tmp_path / "s" / run.path / "up1", mode="r")[:]
    assert (values[0] == 0).all()
    assert np.isnan(values[1]).all()


def test_shard_is_what_zarr_python_itself_would_write(tmp_path, lab):
    _, run = lab.full(tmp_path / "s", 10)
    ours = tmp_path / "s" / run.path / "up1"
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "zarr.json").write_bytes((ours / "zarr.json").read_bytes())
    # Our shape is (10,) and the shard has room for 64: zarr-python writes absent ones as gaps, too.
    zarr.open_array(theirs, mode="r+")[:] = expected(lab, 10, "up1")
    assert with_tensorstore(theirs).read().result().tobytes() == expected(lab, 10, "up1").tobytes()
    their_bytes, our_bytes = ((folder / "c.0.0.0.0").read_bytes() for folder in (theirs, ours))
    images, index, label = 10 * (96 + 4), 64 * 16 + 4, 64 * 8 + 8 + 4
    assert our_bytes[:images] + our_bytes[images + label :] == their_bytes
    assert len(their_bytes) == images + index


def test_groups_open_without_a_warning_and_say_what_they_are(tmp_path, lab):
    _, run = lab.full(tmp_path / "s", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = zarr.open_group(tmp_path / "s" / "toy", mode="r")
        arrays = {name for name, node in dataset.members(max_depth=None) if isinstance(node, zarr.Array)}
    below = run.path.removeprefix("toy/")
    layers = lab.LAYERS
    table = {f"samples/{column}" for column in ("key", "split", "digest")}
    assert arrays == {f"{below}/{x}" for x in layers} | {f"{below}/committed/{x}" for x in layers} | table
    own = zarr.open_group(tmp_path / "s" / run.path, mode="r").attrs["featstore"]
    assert own["recipe"] == run.recipe.to_json()
    assert own["fingerprint"] == run.fingerprint
    assert (own["block_length"], own["batch_size"]) == (64, 8)
    assert own["provenance"] == [{"who": "a test", "layers": sorted(layers)}]
    assert dataset.attrs["featstore"]["images"] == 5


@pytest.mark.parametrize("n", [1, 100, 5000])
def test_the_sample_table_opens_without_featstore(tmp_path, lab, n):
    """Parts of 4,096 rows; tensorstore has no strings, so it reads the digests alone."""
    fs.create(tmp_path / "s").put_samples("toy", lab.table(n), source="made up")
    folder, want = tmp_path / "s" / "toy" / "samples", lab.table(n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(folder, mode="r")
        keys, splits, digests = (group[column][:] for column in ("key", "split", "digest"))
    assert tuple(keys) == want.keys
    assert tuple(splits) == want.splits
    assert digests.shape == (n, 32)
    assert tuple(bytes(row).hex() for row in digests) == want.digests
    np.testing.assert_array_equal(with_tensorstore(folder / "digest").read().result(), digests)
    assert group["digest"].metadata.dimension_names == ("image", "byte")
    assert group["key"].chunks == (4096,)
    for column in ("key", "split"):
        with pytest.raises(ValueError, match="string"):
            with_tensorstore(folder / column)


def test_int8_layers_open_without_featstore(tmp_path, lab):
    """Maps times scales are what the reader gives; bases of reduced layers are opened in test_basis.py."""
    rows = range(70)
    _, run = lab.full(tmp_path / "s", 70, precision="int8")
    below = tmp_path / "s" / run.path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maps, scales = (zarr.open_array(below / x, mode="r")[:] for x in ("up1", "scales/up1"))
    np.testing.assert_array_equal(with_tensorstore(below / "scales" / "up1").read().result(), scales)
    np.testing.assert_array_equal(with_tensorstore(below / "up1").read().result(), maps)
    values = (maps * scales[:, :, None, None].astype(np.float32)).astype(np.float16)
    np.testing.assert_array_equal(values, run.numpy("up1", rows))


def test_path_follows_the_recipe(tmp_path, lab):
    _, run = lab.start(tmp_path / "s", 1)
    family = lab.recipe().family_digest
    assert run.path == f"toy/reference/controlnet_canny_lora-{family}/t050"
    _, other = lab.start(tmp_path / "s", 1, timestep=0)
    assert other.path == f"toy/reference/controlnet_canny_lora-{family}/t000"


def test_growth_is_seen_by_other_readers(tmp_path, lab):
    lab.full(tmp_path / "s", 70)
    before = lab.files(tmp_path / "s")
    store = fs.create(tmp_path / "s")
    store.put_samples("toy", lab.table(130), source="made up")
    run = store.dataset("toy").runs()[0]
    for layer in lab.LAYERS:
        for path in (layer, f"committed/{layer}"):
            document = json.loads((tmp_path / "s" / run.path / path / "zarr.json").read_bytes())
            assert document["shape"][0] == 130
    array = zarr.open_array(tmp_path / "s" / run.path / "up1", mode="r")
    np.testing.assert_array_equal(array[:70], expected(lab, 70, "up1"))
    assert np.isnan(array[70:]).all()
    lab.fill(run)
    np.testing.assert_array_equal(array[:], expected(lab, 130, "up1"))
    np.testing.assert_array_equal(run["up1"].compute(), expected(lab, 130, "up1"))
    after = lab.files(tmp_path / "s")
    assert after[f"{run.path}/up1/c.0.0.0.0"] == before[f"{run.path}/up1/c.0.0.0.0"]
    assert set(after) >= set(before)
    assert Path(tmp_path / "s" / run.path / "up1" / "c.2.0.0.0").exists()

"""Writing blocks: merging, refusing, and the order of durable steps."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import featstore.store as fs
from featstore.errors import BadRequestError, CorruptError, IncompatibleError, NotCommittedError, StorageError
from featstore.store import hints, layout
from featstore.store.local import LocalObjects


def one_layer(rows, value=1.0, shape=(3, 4, 4)):
    return {"up1": np.full((len(rows), *shape), value, dtype=np.float16)}


@pytest.mark.parametrize(
    ("shapes", "itemsize", "images"),
    [
        ([(320, 64, 64)], 2, 25),  # 2.62 MB a map: 25 fill 65.5 MB of the 67.1 that 64 MiB are
        ([(77, 8, 8), (320, 64, 64)], 4, 12),
        ([(32, 16, 16)], 2, 64),
        ([(1280, 256, 256)], 4, 1),
    ],
)
def test_block_length(shapes, itemsize, images):
    assert layout.block_length(shapes, itemsize) == images


def test_rows_written_in_pieces_equal_a_block_written_at_once(tmp_path, lab):
    lab.full(tmp_path / "a", 100)
    _, run = lab.start(tmp_path / "b", 100)
    lab.fill(run, rows=range(90, 100))
    lab.fill(run, rows=range(0, 100, 3))
    lab.fill(run, piece=7)
    fs.create(tmp_path / "b").finish([run])
    assert lab.files(tmp_path / "a") == lab.files(tmp_path / "b")


def test_valid_rows_stay_byte_for_byte_even_when_brought_again(tmp_path, lab):
    store, run = lab.full(tmp_path / "s", 10, layers={"up1": (3, 4, 4)})
    before = lab.files(tmp_path / "s")
    assert run.write_block(0, [2, 3], one_layer([2, 3])) == 0
    assert lab.files(tmp_path / "s") == before
    store.put_samples("toy", lab.table(10, changed=[3]), source="made up")
    run = store.dataset("toy").runs()[0]
    assert run.write_block(0, [2, 3], one_layer([2, 3])) > 0
    np.testing.assert_array_equal(run.numpy("up1", [2]), lab.maps_of(run, [2], "up1"))
    assert (run.numpy("up1", [3]) == 1).all()


def test_bytes_written_are_those_on_disk(tmp_path, lab):
    _, run = lab.start(tmp_path / "s", 10, layers={"up1": (3, 4, 4)})
    written = run.write_block(0, range(10), one_layer(range(10)))
    # 10 maps of 48 float16 and a crc32c each, the label of 64 numbers and the shard's place, the index of 64 pairs, and
    # the record of 64 numbers.
    assert written == 10 * (96 + 4) + (64 * 8 + 8 + 4) + (64 * 16 + 4) + (64 * 8 + 4)
    assert run.layer_bytes("up1") == written - (64 * 8 + 4)


@pytest.mark.parametrize("rows", [[], [5, 4], [4, 4], [63, 64], [64], [-1], [100]])
def test_rows_that_do_not_fit_the_block_are_refused(tmp_path, lab, rows):
    _, run = lab.start(tmp_path / "s", 100, layers={"up1": (3, 4, 4)})
    with pytest.raises(BadRequestError):
        run.write_block(0, rows, one_layer(rows))
    assert not run.committed("up1").any()


@pytest.mark.parametrize("block", [-1, 2])
def test_blocks_that_are_not_there_are_refused(tmp_path, lab, block):
    _, run = lab.start(tmp_path / "s", 100, layers={"up1": (3, 4, 4)})
    with pytest.raises(BadRequestError, match=r"outside 0\.\.1"):
        run.write_block(block, [1], one_layer([1]))


@pytest.mark.parametrize(
    "maps",
    [
        {"up1": np.zeros((2, 3, 4, 4), dtype=np.float32)},
        {"up1": np.zeros((1, 3, 4, 4), dtype=np.float16)},
        {"up1": np.zeros((2, 3, 4, 5), dtype=np.float16)},
        {"up1": np.zeros((2, 3, 4, 4), dtype=">f2")},
    ],
)
def test_maps_that_do_not_fit_are_refused(tmp_path, lab, maps):
    _, run = lab.start(tmp_path / "s", 10, layers={"up1": (3, 4, 4)})
    with pytest.raises(BadRequestError, match="are wanted"):
        run.write_block(0, [1, 2], maps)
    with pytest.raises(NotCommittedError, match="unknown layer"):
        run.write_block(0, [1, 2], {"up2": maps["up1"]})


def test_strided_maps_are_written_as_they_read(tmp_path, lab):
    _, run = lab.start(tmp_path / "s", 10, layers={"up1": (3, 4, 4)})
    values = np.arange(4 * 4 * 3 * 2, dtype=np.float16).reshape(4, 4, 3, 2).T
    run.write_block(0, [1, 2], {"up1": values})
    np.testing.assert_array_equal(run.numpy("up1", [1, 2]), values)


def test_broken_neighbours_stop_a_merge_and_broken_rows_brought_again_are_mended(tmp_path, lab):
    _, run = lab.start(tmp_path / "s", 10, layers={"up1": (3, 4, 4)})
    lab.fill(run, rows=range(5))
    shard = tmp_path / "s" / run.path / "up1" / "c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[2 * 100 + 7] ^= 4  # in the third image
    shard.write_bytes(data)
    with pytest.raises(CorruptError, match="place 2 of the block"):
        run.write_block(0, [7], {"up1": lab.maps_of(run, [7], "up1")})
    run.write_block(0, [2, 7], {"up1": lab.maps_of(run, [2, 7], "up1")})
    rows = [0, 1, 2, 3, 4, 7]
    np.testing.assert_array_equal(run.numpy("up1", rows), lab.maps_of(run, rows, "up1"))


def test_layers_added_later_share_the_block_length(tmp_path, lab):
    big = {"wide": (1024, 64, 64)}  # 8 MiB a map: 8 images a block
    _, run = lab.start(tmp_path / "s", 20, layers=big)
    assert (run.block_length, run.n_blocks) == (8, 3)
    _, run = lab.start(tmp_path / "s", 20)
    assert set(run.layers) == {*lab.LAYERS, "wide"}
    assert run.block_length == 8
    assert [entry["layers"] for entry in run.provenance] == [["wide"], sorted(lab.LAYERS)]
    assert not run.valid(["up1", "wide"]).any()


def test_creating_a_run_again_changes_nothing(tmp_path, lab):
    lab.full(tmp_path / "s", 10)
    before = lab.files(tmp_path / "s")
    store = fs.create(tmp_path / "s")
    run = store.dataset("toy").create_run(lab.recipe(), {"up1": (3, 4, 4)}, batch_size=99, provenance={"who": "else"})
    assert run.batch_size == 8
    assert lab.files(tmp_path / "s") == before
    with pytest.raises(IncompatibleError, match="shape"):
        store.dataset("toy").create_run(lab.recipe(), {"up1": (3, 4, 5)}, batch_size=8, provenance={})


def test_another_recipe_with_the_same_eight_digits_is_refused(tmp_path, lab, monkeypatch):
    monkeypatch.setattr(type(lab.recipe()), "family_digest", "0" * 8)
    _, run = lab.start(tmp_path / "s", 10)
    assert fs.open(tmp_path / "s").dataset("toy").find(lab.recipe()).fingerprint == run.fingerprint
    with pytest.raises(IncompatibleError, match="fingerprint"):
        lab.start(tmp_path / "s", 10, seed=1)
    with pytest.raises(IncompatibleError, match="fingerprint"):
        fs.open(tmp_path / "s").dataset("toy").find(lab.recipe(seed=1))


def test_a_store_opened_for_reading_cannot_be_written(tmp_path, lab):
    lab.full(tmp_path / "s", 10)
    store = fs.open(tmp_path / "s")
    run = store.dataset("toy").runs()[0]
    with pytest.raises(StorageError, match="reading only"):
        run.write_block(0, [0], {"up1": lab.maps_of(run, [0], "up1")})
    with pytest.raises(StorageError, match="reading only"):
        store.put_samples("toy", lab.table(11), source="made up")
    with pytest.raises(StorageError, match="reading only"):
        store.dataset("toy").create_run(lab.recipe(seed=2), lab.LAYERS, batch_size=8, provenance={})
    with pytest.raises(StorageError, match="reading only"):
        store.finish()


@pytest.mark.parametrize("bad", ["../x", "a/b", ".hidden", "", "committed", "zarr.json", "c", "x" * 121, "__x", "ä"])
def test_names_cannot_leave_the_store(tmp_path, lab, bad):
    store, run = lab.start(tmp_path / "s", 3)
    before = lab.files(tmp_path)
    with pytest.raises(BadRequestError, match="cannot be a name"):
        store.put_samples(bad, lab.table(3), source="made up")
    with pytest.raises(BadRequestError, match="cannot be a name"):
        run.dataset.create_run(lab.recipe(), {bad: (1, 1, 1)}, batch_size=1, provenance={})
    assert lab.files(tmp_path) == before


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, 1), (1, -1, 1), (1 << 20, 1 << 20, 1)])
def test_shapes_that_cannot_be(tmp_path, lab, shape):
    with pytest.raises(BadRequestError, match="shape"):
        lab.start(tmp_path / "s", 3, layers={"up1": shape})


def test_model_names_cannot_leave_the_store(tmp_path, lab):
    with pytest.raises(BadRequestError, match="cannot be a name"):
        lab.start(tmp_path / "s", 3, model="..")
    assert not (tmp_path / "s" / "toy" / "..-").exists()


def test_the_shard_is_durable_before_the_record_and_the_record_before_what_relies_on_it(tmp_path, lab, monkeypatch):
    _, run = lab.start(tmp_path / "s", 10, layers={"up1": (3, 4, 4)})
    run.valid(["up1"])
    steps = []
    names = {}

    def name(path):
        return str(path).removeprefix(f"{tmp_path}/s/").replace(run.path, "RUN")

    def fsync(fd, original=os.fsync):
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        original(fd)
        steps.append(("sync", path if path.endswith(".partial") else name(path)))

    def replace(source, target, original=os.replace):
        original(source, target)
        names[os.fspath(source)] = name(target)
        steps.append(("name", name(target)))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    run.write_block(0, range(10), one_layer(range(10)))
    shard, record = "RUN/up1/c.0.0.0.0", "RUN/committed/up1/c.0"
    # Each file's bytes before its name, the shard's name before the record's bytes; the record's name may come late.
    assert [(step, names.get(path, path)) for step, path in steps] == [
        ("sync", shard),
        ("name", shard),
        ("sync", "RUN/up1"),
        ("sync", record),
        ("name", record),
    ]
    steps.clear()
    run.dataset.objects.settle(f"{run.path}/committed/up1")
    fs.create(tmp_path / "s").finish([run])
    order = [(step, names.get(path, path)) for step, path in steps]
    complete = next(place for place, (step, path) in enumerate(order) if step == "name" and "complete" in path)
    assert ("sync", "RUN/committed/up1") in order[1:complete]


def test_hints_to_the_kernel_change_no_bytes(tmp_path, monkeypatch):
    pieces = [os.urandom(3 << 20) for _ in range(9)] + [b"end"]
    asked = []
    begin = hints.begin_writing_back

    def noted(fd, offset, length):
        asked.append((offset, length))
        begin(fd, offset, length)

    monkeypatch.setattr(hints, "begin_writing_back", noted)
    objects = LocalObjects(tmp_path)
    objects.put("a", *pieces)
    assert objects.get("a") == b"".join(pieces)
    assert asked == [(part * (8 << 20), 8 << 20) for part in range(3)]
    monkeypatch.setattr(hints, "_sync_file_range", None)
    objects.put("b", *pieces)
    assert objects.get("b") == b"".join(pieces)
    LocalObjects(tmp_path, durable=False).put("c", *pieces)
    assert len(asked) == 6

"""The sample table as it lies in a store: parts that are read when they are needed, restored from copies, checked."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from crc32c import crc32c

import featstore.store as fs
from featstore.errors import BadRequestError, CorruptError, FeatstoreError
from featstore.store import metadata, stored_samples
from featstore.store import store as stores
from featstore.store.local import LocalObjects
from featstore.store.stored_samples import COLUMNS, PART_ROWS, copy_key, part_key
from featstore.store.verify import verify
from tests.store.fake_remote import FakeRemote

MANY = 2 * PART_ROWS + 100
"""Rows in three parts."""


def put(url, table):
    return fs.create(url).put_samples("toy", table, source="made up")


def replace(path, data):
    """Put ``data`` at ``path`` with the checksum that belongs to it: only what it says gives it away."""
    path.write_bytes(data + int(crc32c(data)).to_bytes(4, "little"))


class Watched(LocalObjects):
    """Notes what is put and what is read."""

    def __init__(self, root):
        super().__init__(root)
        self.touched = []

    def put(self, key, *buffers, durable=True):
        self.touched.append(("put", key))
        return super().put(key, *buffers, durable=durable)

    def get(self, key, *, max_bytes=None):
        self.touched.append(("get", key))
        return super().get(key, max_bytes=max_bytes)

    def of(self, kind):
        return sorted(key for what, key in self.touched if what == kind and "samples" in key)


@pytest.fixture
def watched(tmp_path, monkeypatch):
    objects = Watched(tmp_path / "s")
    monkeypatch.setattr(stores, "objects_at", lambda url: objects)
    return objects


@pytest.mark.parametrize("n", [0, 1, PART_ROWS - 1, PART_ROWS, PART_ROWS + 1, MANY])
def test_a_table_comes_back_as_it_was_put(tmp_path, lab, n):
    table = lab.table(n)
    for dataset in (put(tmp_path / "s", table), fs.open(tmp_path / "s").dataset("toy")):
        assert len(dataset.samples) == n
        assert dataset.samples.table() == table
        digests = dataset.samples.digest_bytes(0, n)
        assert digests.shape == (n, 32)
        assert digests.tobytes().hex() == "".join(table.digests)
        for start, stop in ((0, min(n, 3)), (n // 2, n), (max(0, n - 1), n), (n, n)):
            part = fs.open(tmp_path / "s").dataset("toy").samples.digest_bytes(start, stop)
            np.testing.assert_array_equal(part, digests[start:stop])
        for row in {0, n // 2, n - 1} if n else ():
            assert dataset.samples.key(row) == table.keys[row]
        assert dataset.rows(["nobody", *table.keys[-2:]]).tolist() == [-1, *range(n)[-2:]]
    assert verify(fs.open(tmp_path / "s")).ok


def test_any_names_will_do(tmp_path, lab):
    keys = ("a/b.png", "..", "ä ö 漢字 🐎", "\n\t\0", " ", "x" * 5000, "../../etc/passwd", "/abs", "~", "c.0")
    table = fs.SampleTable(keys=keys, digests=tuple(map(lab.digest, range(len(keys)))), splits=("", *keys[1:]))
    put(tmp_path / "s", table)
    assert fs.open(tmp_path / "s").dataset("toy").samples.table() == table
    assert verify(fs.open(tmp_path / "s")).ok


def test_opening_reads_no_part_and_a_block_one(watched, lab):
    put("x", lab.table(MANY))
    dataset = fs.open("x").dataset("toy")
    watched.touched.clear()
    assert len(fs.open("x").dataset("toy").samples) == MANY
    assert watched.of("get") == []
    dataset.samples.digest_bytes(PART_ROWS + 5, PART_ROWS + 70)
    dataset.samples.digest_bytes(PART_ROWS, PART_ROWS + 1)
    dataset.samples.key(MANY - 1)
    assert watched.of("get") == ["toy/samples/digest/c.1.0", "toy/samples/key/c.2"]


@pytest.mark.parametrize(
    ("n", "changed", "columns"),
    [
        (MANY, (), []),
        (MANY, (0,), [("digest", 0)]),
        (MANY, (5, PART_ROWS), [("digest", 0), ("digest", 1)]),
        (MANY + 1, (), [(column, 2) for column in COLUMNS]),
        (MANY + PART_ROWS, (), [(column, number) for column in COLUMNS for number in (2, 3)]),
    ],
)
def test_only_the_parts_that_change_are_written(watched, lab, n, changed, columns):
    put("x", lab.table(MANY))
    watched.touched.clear()
    put("x", lab.table(n, changed))
    keys = {key("toy", *column) for column in columns for key in (part_key, copy_key)}
    assert {key for key in watched.of("put") if not key.endswith("zarr.json")} == keys
    assert fs.open("x").dataset("toy").samples.table() == lab.table(n, changed)


def test_a_removed_image_keeps_its_row_and_a_split_may_change(tmp_path, lab):
    put(tmp_path / "s", lab.table(10))
    some = lab.table(10)
    fewer = fs.SampleTable(keys=some.keys[4:], digests=some.digests[4:], splits=("val",) * 6)
    dataset = put(tmp_path / "s", fewer)
    assert dataset.samples.keys == some.keys
    assert dataset.samples.splits == (*some.splits[:4], *["val"] * 6)
    assert dataset.samples.digests == some.digests


def test_a_reader_opened_before_growth_sees_what_there_was(tmp_path, lab):
    _, old = lab.full(tmp_path / "s", 70)
    reader = fs.open(tmp_path / "s").dataset("toy").runs()[0]
    lab.full(tmp_path / "s", 200)
    assert reader.n_images == 70
    assert reader.dataset.samples.keys == lab.table(70).keys
    assert reader.valid(["up1"]).shape == (70,)
    assert reader.valid(["up1"]).all()
    np.testing.assert_array_equal(reader.numpy("up1", range(70)), lab.maps_of(old, range(70), "up1"))
    assert reader["up1"].shape[0] == 70
    with pytest.raises(BadRequestError):
        reader.numpy("up1", [70])


def test_features_are_said_to_be_of_the_images_that_they_were_computed_from(tmp_path, lab):
    """Another process brings a changed image between our listing and our first write, before we read any digest."""
    _, run = lab.start(tmp_path / "s", 10)
    put(tmp_path / "s", lab.table(10, changed=[4]))
    run.write_block(0, range(10), {layer: lab.maps_of(run, range(10), layer) for layer in run.layers})
    now = fs.open(tmp_path / "s").dataset("toy").runs()[0]
    assert np.flatnonzero(~now.valid(["up1"])).tolist() == [4]
    assert int(now.committed("up1")[4]) == int(lab.digest(4)[:16], 16)


@pytest.mark.parametrize("remote", [False, True])
def test_tables_that_grow_at_once_lose_nothing(tmp_path, lab, monkeypatch, remote):
    """From threads that share no lock, as on different machines: a lease is what keeps them apart."""
    objects = FakeRemote() if remote else LocalObjects(tmp_path / "s")
    monkeypatch.setattr(stores, "objects_at", lambda url: objects)
    if remote:
        monkeypatch.setattr(type(objects), "lock", lambda self, name: contextlib.nullcontext())
    put("x", lab.table(3))
    tables = [
        fs.SampleTable(keys=("img0000", f"extra{i}"), digests=(lab.digest(0), lab.digest(100 + i)), splits=("a", "b"))
        for i in range(12)
    ]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda table: put("x", table), tables))
    table = fs.open("x").dataset("toy").samples.table()
    assert table.keys[:3] == lab.table(3).keys
    assert set(table.keys[3:]) == {f"extra{i}" for i in range(12)}
    for key, digest in zip(table.keys[3:], table.digests[3:], strict=True):
        assert digest == lab.digest(100 + int(key.removeprefix("extra")))


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("number", [0, 2])
def test_a_damaged_part_is_restored_from_its_copy_and_the_other_way_round(tmp_path, lab, column, number):
    put(tmp_path / "s", lab.table(MANY))
    pristine = lab.files(tmp_path / "s")
    for key in (part_key("toy", column, number), copy_key("toy", column, number)):
        path = tmp_path / "s" / key
        for damage in (lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: b"", None):
            if damage is None:
                path.unlink()
            else:
                path.write_bytes(damage(pristine[key]))
            if key == part_key("toy", column, number):
                with pytest.raises(CorruptError, match=key):
                    fs.open(tmp_path / "s").dataset("toy").samples.table()
            else:
                assert fs.open(tmp_path / "s").dataset("toy").samples.table() == lab.table(MANY)
            report = verify(fs.open(tmp_path / "s"))
            assert len(report.corrupt) == 1
            assert key in report.corrupt[0]
            assert verify(fs.create(tmp_path / "s"), repair=True).repaired == 1
            assert lab.files(tmp_path / "s") == pristine
            assert verify(fs.open(tmp_path / "s")).ok


def test_a_part_that_is_lost_with_its_copy_is_said_to_be(tmp_path, lab):
    lab.full(tmp_path / "s", 10)
    for key in (part_key("toy", "digest", 0), copy_key("toy", "digest", 0)):
        (tmp_path / "s" / key).write_bytes(b"nothing")
    report = verify(fs.create(tmp_path / "s"), repair=True)
    assert len(report.corrupt) == 1
    assert "from a backup, or remove the data set" in report.corrupt[0]
    assert report.incomplete == ("runs of data set 'toy' were not checked: its sample table is damaged",)
    with pytest.raises(CorruptError, match="digest"):
        fs.open(tmp_path / "s").dataset("toy").runs()[0].valid(["up1"])


def test_a_copy_that_is_ahead_of_its_part_is_caught_up_with(tmp_path, lab):
    """Killed between the two: the part counts, and the same request again writes both."""
    put(tmp_path / "s", lab.table(10))
    shutil.copytree(tmp_path / "s", tmp_path / "t")
    put(tmp_path / "t", lab.table(10, changed=[2]))
    ahead = copy_key("toy", "digest", 0)
    shutil.copyfile(tmp_path / "t" / ahead, tmp_path / "s" / ahead)
    assert fs.open(tmp_path / "s").dataset("toy").samples.table() == lab.table(10)
    assert "is no copy of" in verify(fs.open(tmp_path / "s")).corrupt[0]
    put(tmp_path / "s", lab.table(10, changed=[2]))
    assert verify(fs.open(tmp_path / "s")).ok


@pytest.mark.parametrize("images", [-1, 2**40, 2**63, "10", 1.5, None, [10], True])
def test_a_number_of_images_that_cannot_be(tmp_path, lab, images):
    """A stranger's document, soundly sealed. What it claims costs no memory, and is refused before it is believed."""
    lab.full(tmp_path / "s", 10)
    path = tmp_path / "s" / "toy" / "zarr.json"
    document = json.loads(path.read_bytes())
    document["attributes"]["featstore"]["images"] = images
    path.write_bytes(metadata.seal(document))
    if images is True:  # One image, as far as Python is concerned.
        assert len(fs.open(tmp_path / "s").dataset("toy").samples) == 1
        return
    with pytest.raises(CorruptError):
        fs.open(tmp_path / "s").dataset("toy").samples.table()
    assert verify(fs.open(tmp_path / "s")).corrupt


@pytest.mark.parametrize("images", [PART_ROWS + 1, 10**6, 2**39])
def test_more_images_than_there_are(tmp_path, lab, images):
    lab.full(tmp_path / "s", 10)
    path = tmp_path / "s" / "toy" / "zarr.json"
    document = json.loads(path.read_bytes())
    document["attributes"]["featstore"]["images"] = images
    path.write_bytes(metadata.seal(document))
    dataset = fs.open(tmp_path / "s").dataset("toy")
    run = dataset.runs()[0]
    for call in (
        lambda: dataset.samples.keys,
        lambda: dataset.samples.digests,
        lambda: run.valid(["up1"]),
        lambda: run.valid(["nothing"]),
        lambda: run.committed("up1"),
        lambda: run.numpy("up1", [0]),
        lambda: run["up1"],
        lambda: run.layer_bytes("up1"),
        lambda: list(run.blocks(["up1"])),
    ):
        with pytest.raises(CorruptError, match="is gone, though its data set has such rows"):
            call()


def texts(*values, count=PART_ROWS):
    rows = [value.encode() if isinstance(value, str) else value for value in values]
    rows += [b""] * (PART_ROWS - len(rows))
    return struct.pack("<I", count) + b"".join(struct.pack("<I", len(row)) + row for row in rows)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0",
        struct.pack("<I", PART_ROWS),
        struct.pack("<I", 0xFFFFFFFF),
        texts("a", count=PART_ROWS + 1),
        texts("a", count=3),
        struct.pack("<I", PART_ROWS) + struct.pack("<I", 0xFFFFFFFF) + b"x" * 100,
        struct.pack("<I", PART_ROWS) + struct.pack("<I", 0x7FFFFFFF) + b"x" * 100,
        texts(b"\xff\xfe"),
        texts(b"\xed\xa0\x80"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path, lab, data):
    put(tmp_path / "s", lab.table(3))
    replace(tmp_path / "s" / part_key("toy", "key", 0), data)
    with pytest.raises(CorruptError, match=r"samples/key/c\.0"):
        fs.open(tmp_path / "s").dataset("toy").samples.keys  # noqa: B018
    assert verify(fs.create(tmp_path / "s"), repair=True).repaired == 1
    assert fs.open(tmp_path / "s").dataset("toy").samples.table() == lab.table(3)


@pytest.mark.parametrize("names", [("a", "a", "b"), ("a", "", "b")], ids=["twice", "none"])
def test_names_that_make_no_table_are_found(tmp_path, lab, names):
    """Sound parts, and sound copies of them: no image may have two rows, or no name."""
    put(tmp_path / "s", lab.table(3))
    for key in (part_key("toy", "key", 0), copy_key("toy", "key", 0)):
        replace(tmp_path / "s" / key, texts(*names))
    report = verify(fs.open(tmp_path / "s"))
    assert len(report.corrupt) == 1
    assert "toy/samples holds no sound sample table" in report.corrupt[0]
    with pytest.raises(FeatstoreError):
        fs.open(tmp_path / "s").dataset("toy").samples.table()


def test_parts_are_as_long_as_they_must_be(tmp_path, lab):
    put(tmp_path / "s", lab.table(3))
    replace(tmp_path / "s" / part_key("toy", "digest", 0), bytes(32 * 3))
    with pytest.raises(CorruptError, match="no part of 4096 digests"):
        fs.open(tmp_path / "s").dataset("toy").samples.digests  # noqa: B018
    objects = LocalObjects(tmp_path / "s")
    objects.put(part_key("toy", "digest", 0), bytes(stored_samples._PART_MAX_BYTES + 1))
    with pytest.raises(CorruptError, match="at most"):
        fs.open(tmp_path / "s").dataset("toy").samples.digests  # noqa: B018

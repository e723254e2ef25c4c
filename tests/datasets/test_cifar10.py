"""CIFAR-10 from tiny files in its three forms, and pickles that want more than they should."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featstore.datasets import DATASETS, Dataset, UnreadableImageError, resolve
from featstore.datasets.cifar10 import CLASSES
from featstore.errors import BadRequestError, CorruptError, NotFoundError

BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
LABELS = [[3, 0], [0, 9], [3, 3], [1, 2], [5, 5], [0, 0, 7]]
KEYS = [
    *("train/cat/0000", "train/airplane/0000", "train/airplane/0001", "train/truck/0000", "train/cat/0001"),
    *("train/cat/0002", "train/automobile/0000", "train/bird/0000", "train/dog/0000", "train/dog/0001"),
    *("test/airplane/0000", "test/airplane/0001", "test/horse/0000"),
]


def picture(batch: int, number: int) -> np.ndarray:
    return np.random.default_rng([batch, number]).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def rows(batch: int) -> np.ndarray:
    """(n, 3072) as batches hold them: all of red, then green, then blue."""
    return np.stack([picture(batch, k).transpose(2, 0, 1).reshape(-1) for k in range(len(LABELS[batch]))])


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes that cPickle of Python 2 wrote into the real files: str for all text and bytes."""

    def text(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b")
    array += b"\x87R("
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    shape = b"".join(map(number, data.shape)) + b"\x86"
    array += number(1) + shape + dtype + b"\x89" + text(data.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    names = b"](" + b"".join(text(b"x_s_%06d.png" % k) for k in labels) + b"e"
    entries = [(b"batch_label", text(b"training batch 1 of 5")), (b"labels", listed), (b"data", array)]
    entries.append((b"filenames", names))
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in entries) + b"u."


def write_pickles(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for batch, name in enumerate(BATCHES):
        (folder / name).write_bytes(python2_pickle(rows(batch), LABELS[batch]))
    return folder


def write_binaries(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for batch, name in enumerate(BATCHES):
        values = np.concatenate([np.array(LABELS[batch], np.uint8)[:, None], rows(batch)], 1)
        (folder / f"{name}.bin").write_bytes(values.tobytes())
    return folder


def write_pictures(folder: Path) -> Path:
    counts: dict[str, int] = {}
    for batch, labels in enumerate(LABELS):
        for number, label in enumerate(labels):
            place = f"{'test' if batch == 5 else 'train'}/{CLASSES[label]}"
            counts[place] = counts.get(place, 0) + 1
            (folder / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(batch, number)).save(folder / place / f"{counts[place] - 1:04d}.png")
    return folder


def facts(dataset: Dataset) -> dict[str, tuple[object, ...]]:
    return {
        one.key: (one.digest, one.split, dataset.image_label(one.key), dataset.image(one.key).tobytes())
        for one in dataset.samples
    }


def expected() -> dict[str, tuple[object, ...]]:
    pictures = [(batch, number) for batch, labels in enumerate(LABELS) for number in range(len(labels))]
    return {
        key: (
            hashlib.sha256(picture(*one).tobytes()).hexdigest(),
            key.split("/")[0],
            LABELS[one[0]][one[1]],
            picture(*one).tobytes(),
        )
        for key, one in zip(KEYS, pictures, strict=True)
    }


@pytest.mark.parametrize("below", [".", "cifar10"])
@pytest.mark.parametrize(("name", "write"), [("py", write_pickles), ("bin", write_binaries)])
def test_batches_of_both_kinds(tmp_path: Path, below: str, name: str, write) -> None:
    entry = DATASETS["cifar10"]
    assert not entry.present(tmp_path)
    write(tmp_path / below / f"cifar-10-batches-{name}")
    assert entry.present(tmp_path)
    dataset = resolve("cifar10", data_root=tmp_path)
    assert [one.key for one in dataset.samples] == KEYS
    assert facts(dataset) == expected()
    assert dataset.mask(KEYS[0]) is None
    assert dataset.info.image_classes == CLASSES
    assert (dataset.info.model, dataset.info.name, bool(dataset.info.prompt)) == ("sd15", "cifar10", True)


def test_folders_of_pictures_are_the_same_samples(tmp_path: Path) -> None:
    write_pictures(tmp_path / "cifar10")
    assert DATASETS["cifar10"].present(tmp_path)
    dataset = resolve("cifar10", data_root=tmp_path)
    assert facts(dataset) == expected()
    assert [one.key for one in dataset.samples[:3]] == [
        "train/airplane/0000",
        "train/airplane/0001",
        "train/automobile/0000",
    ]
    assert [one.split for one in dataset.samples] == ["train"] * 10 + ["test"] * 3


def test_pickles_that_python_3_wrote_are_read_too(tmp_path: Path) -> None:
    folder = write_pickles(tmp_path / "cifar-10-batches-py")
    for protocol in (2, 4):
        value = {"labels": LABELS[0], "data": rows(0), "batch_label": b"1 of 5"}
        (folder / "data_batch_1").write_bytes(pickle.dumps(value, protocol=protocol))
        assert facts(resolve("cifar10", data_root=tmp_path)) == expected()


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("place", ["labels", "data", "batch_label"])
def test_a_pickle_that_runs_code_is_refused_before_it_does(tmp_path: Path, place: str) -> None:
    folder = write_pickles(tmp_path / "cifar-10-batches-py")
    target = tmp_path / "touched"
    value = {"labels": LABELS[0], "data": rows(0), "batch_label": "x"}
    data = pickle.dumps(value | {place: Evil(target)}, protocol=2)
    pickle.loads(data)  # it does what it is meant to
    assert target.exists()
    target.unlink()
    (folder / "data_batch_1").write_bytes(data)
    with pytest.raises(CorruptError, match=r"data_batch_1 holds .*, which no batch of CIFAR-10 does") as caught:
        _ = resolve("cifar10", data_root=tmp_path).samples
    assert not target.exists()
    assert caught.value.hint


@pytest.mark.parametrize(
    "name", [b"os\nsystem", b"builtins\neval", b"numpy\nload", b"numpy.core.multiarray\nfromfile", b"_codecs\ndecode"]
)
def test_no_other_name_is_looked_up(tmp_path: Path, name: bytes) -> None:
    folder = write_pickles(tmp_path / "cifar-10-batches-py")
    (folder / "test_batch").write_bytes(b"\x80\x02c" + name + b"\n.")
    with pytest.raises(CorruptError, match=name.decode().replace("\n", r"\.")):
        _ = resolve("cifar10", data_root=tmp_path).samples


@pytest.mark.parametrize(
    "value",
    [
        {"labels": [0, 1], "data": rows(0).astype(np.float32)},
        {"labels": [0, 1], "data": np.array([{}, {}], dtype=object)},
        {"labels": [0, 10], "data": rows(0)},
        {"labels": [0, -1], "data": rows(0)},
        {"labels": [0], "data": rows(0)},
        {"labels": [0.5, 1.0], "data": rows(0)},
        {"labels": ["a", "b"], "data": rows(0)},
        {"labels": [0, 1], "data": rows(0)[:, :300]},
        {"labels": [0, 1], "data": rows(0).reshape(2, 3, 32, 32)},
        {"labels": [0, 1], "data": b"bytes"},
        {"labels": [0, 1]},
        [1, 2],
    ],
    ids=str,
)
def test_pickles_of_something_else_are_refused(tmp_path: Path, value: object) -> None:
    folder = write_pickles(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_3").write_bytes(pickle.dumps(value, protocol=2))
    with pytest.raises(CorruptError, match="data_batch_3"):
        _ = resolve("cifar10", data_root=tmp_path).samples


def test_damaged_batches_are_refused_or_whole(tmp_path: Path) -> None:
    folder = write_pickles(tmp_path / "cifar-10-batches-py")
    good = (folder / "data_batch_1").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for cut in [0, 1, 10, 100, len(good) - 1, *rng.integers(0, 200, 40).tolist()]:
        bad = bytearray(good)
        if cut < 200:
            bad[cut] ^= 1 << int(rng.integers(8))
        else:
            del bad[cut:]
        (folder / "data_batch_1").write_bytes(bytes(bad))
        try:
            dataset = resolve("cifar10", data_root=tmp_path)
            assert all(dataset.image(one.key).shape == (32, 32, 3) for one in dataset.samples)
        except CorruptError:
            refused += 1
    assert refused > 10


def test_an_array_by_columns_or_of_a_claimed_size_is_refused(tmp_path: Path) -> None:
    folder = write_pickles(tmp_path / "cifar-10-batches-py")
    whole = python2_pickle(rows(0), LABELS[0])
    for old, new in ((b"\x89T", b"\x88T"), (b"J\x02\0\0\0J\0\x0c\0\0", b"J\xff\xff\xff\xffJ\0\x0c\0\0")):
        assert whole.count(old) == 1
        (folder / "data_batch_1").write_bytes(whole.replace(old, new))
        with pytest.raises(CorruptError, match="data_batch_1 is no batch"):
            _ = resolve("cifar10", data_root=tmp_path).samples


def test_damaged_binaries_are_refused(tmp_path: Path) -> None:
    folder = write_binaries(tmp_path / "cifar-10-batches-bin")
    path = folder / "data_batch_2.bin"
    whole = path.read_bytes()
    for bad, message in (
        (whole[:-1], "6145 bytes"),
        (b"", "0 bytes"),
        (b"\x0a" + whole[1:], r"9\.\.10, outside 0\.\.9"),
    ):
        path.write_bytes(bad)
        with pytest.raises(CorruptError, match=message):
            _ = resolve("cifar10", data_root=tmp_path).samples


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="neither cifar-10-batches-py") as caught:
        resolve("cifar10", data_root=tmp_path)
    assert "cifar-10-python.tar.gz" in caught.value.hint
    assert str(tmp_path) in str(caught.value)
    (write_pickles(tmp_path / "a" / "cifar-10-batches-py") / "data_batch_4").unlink()
    with pytest.raises(NotFoundError, match="data_batch_4 is missing"):
        resolve("cifar10", data_root=tmp_path / "a")
    for path in (write_pictures(tmp_path / "b" / "cifar10") / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(NotFoundError, match=r"no pictures in .*test/CLASS"):
        resolve("cifar10", data_root=tmp_path / "b")


def test_a_folder_of_no_class_and_a_broken_picture(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "cifar10")
    (folder / "train" / "cat" / "0000.png").write_text("no picture")
    dataset = resolve("cifar10", data_root=tmp_path)
    assert len({one.digest for one in dataset.samples}) == len(KEYS)
    with pytest.raises(UnreadableImageError, match="not an image"):
        dataset.image("train/cat/0000")
    (folder / "train" / "unicorn").mkdir()
    with pytest.raises(BadRequestError, match="unicorn is no class of cifar10"):
        resolve("cifar10", data_root=tmp_path)


@pytest.mark.parametrize("write", [write_pickles, write_pictures])
def test_unknown_keys_are_refused(tmp_path: Path, write) -> None:
    write(tmp_path / ("cifar10" if write is write_pictures else "cifar-10-batches-py"))
    dataset = resolve("cifar10", data_root=tmp_path)
    for read in (dataset.image, dataset.mask, dataset.image_label):
        with pytest.raises(BadRequestError, match="test/airplane/0009"):
            read("test/airplane/0009")

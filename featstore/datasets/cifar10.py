"""CIFAR-10: 60,000 pictures of 32 px in ten classes, from any of the three forms that people have.

Below the data root, or below its folder ``cifar10``:

- ``cifar-10-batches-py/data_batch_1`` .. ``_5`` and ``test_batch``: the Python version, which torchvision unpacks;
- ``cifar-10-batches-bin/data_batch_1.bin`` .. and ``test_batch.bin``: the binary version;
- ``cifar10/train/CLASS/NAME.png`` and ``cifar10/test/CLASS/NAME.png``.

Keys are ``test/airplane/0003``: in batches, the number among its class in the order of the files, in folders the
file's name. Digests are of the raw RGB pixels, so the same picture is the same sample in every form.
Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from typing_extensions import override

from featstore.datasets.base import Dataset, DatasetInfo, Sample, UInt8Array, UnreadableImageError, other_bytes
from featstore.datasets.cifar10_batches import Batch, read_binary, read_pickle
from featstore.datasets.entries import DatasetEntry
from featstore.datasets.files import FileDataset, FileItem, file_digests, unreadable_digest
from featstore.datasets.pixels import read_image
from featstore.errors import BadRequestError, NotFoundError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The ten classes, in label order."""
ARCHIVE_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SOURCE = "the archive cifar-10-python.tar.gz (170 MB) of www.cs.toronto.edu/~kriz/cifar.html"
PICKLES, BINARIES, PICTURES = "cifar-10-batches-py", "cifar-10-batches-bin", "cifar10"

INFO = DatasetInfo(
    name="cifar10",
    title="CIFAR-10: small pictures of ten kinds of things",
    image_classes=CLASSES,
    plain_prompt="a photo",
    prompt="a photo, high quality, best quality, highly realistic, masterpiece",
    model="sd15",
    source=SOURCE,
)
_STEMS = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}


class Cifar10Batches(Dataset):
    """CIFAR-10 in batch files; they are read when the first sample is asked for, and kept: 184 MB.

    Raises:
        NotFoundError: if one of the six files is absent.
    """

    def __init__(self, folder: Path) -> None:
        binary = folder.name == BINARIES
        self._read: Callable[[Path], Batch] = read_binary if binary else read_pickle
        suffix = ".bin" if binary else ""
        self._files = [(split, folder / f"{stem}{suffix}") for split, stems in _STEMS.items() for stem in stems]
        if absent := [path for _, path in self._files if not path.is_file()]:
            raise NotFoundError(f"data set 'cifar10': {absent[0]} is missing", hint=f"unpack {SOURCE} again")
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None

    @property
    @override
    def info(self) -> DatasetInfo:
        return INFO

    @property
    @override
    def samples(self) -> tuple[Sample, ...]:
        return self._all().samples

    @override
    def image(self, key: str) -> UInt8Array:
        image: UInt8Array = self._all().images[self._place(key)]
        return image.copy()

    @override
    def image_as(self, key: str, digest: str) -> UInt8Array:
        return _checked(self.image(key), key, digest)

    @override
    def mask(self, key: str) -> None:
        self._place(key)

    @override
    def image_label(self, key: str) -> int:
        self._place(key)
        return _label(key)

    def _place(self, key: str) -> int:
        try:
            return self._all().place[key]
        except KeyError:
            raise BadRequestError(
                f"cifar10 has no image {key!r}", hint="keys are train/CLASS/0000 .. and test/CLASS/0000 .."
            ) from None

    def _all(self) -> _Loaded:
        with self._lock:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded

    def _load(self) -> _Loaded:
        counts: dict[tuple[str, int], int] = {}
        samples, pictures = [], []
        for split, path in self._files:
            labels, images = self._read(path)
            pictures.append(images)
            for label, image in zip(labels.tolist(), images, strict=True):
                number = counts.get((split, label), 0)
                counts[split, label] = number + 1
                key = f"{split}/{CLASSES[label]}/{number:04d}"
                samples.append(Sample(key=key, digest=_pixel_digest(image), split=split))
        place = {sample.key: place for place, sample in enumerate(samples)}
        return _Loaded(samples=tuple(samples), images=np.concatenate(pictures), place=place)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    samples: tuple[Sample, ...]
    images: UInt8Array
    """(N, 32, 32, 3)."""
    place: dict[str, int]


class Cifar10Pictures(FileDataset):
    """CIFAR-10 in folders of PNGs; train first, then by class and name.

    Raises:
        NotFoundError: if there is no picture of a split.
        BadRequestError: for a folder of another name than those of the classes.
    """

    def __init__(self, root: Path) -> None:
        items = []
        for split in _STEMS:
            folders = [path for path in (root / split).iterdir() if path.is_dir()] if (root / split).is_dir() else []
            if strange := [path for path in folders if path.name not in CLASSES and not path.name.startswith(".")]:
                raise BadRequestError(
                    f"{strange[0]} is no class of cifar10; its classes are {', '.join(CLASSES)}",
                    hint="for pictures of other classes write folder:PATH",
                )
            found = sorted(path for name in CLASSES for path in (root / split / name).glob("*.png"))
            if not found:
                raise NotFoundError(
                    f"data set 'cifar10': no pictures in {root / split / 'CLASS'}",
                    hint="both train/CLASS/NAME.png and test/CLASS/NAME.png are needed",
                )
            items += [
                FileItem(key=path.relative_to(root).with_suffix("").as_posix(), image=path, mask=None, split=split)
                for path in found
            ]
        super().__init__(INFO, root, items)

    @override
    def _digests(self) -> list[str]:
        images = [item.image for item in self.items]
        return file_digests(self.root, images, digest_of=_file_pixel_digest, kind="pixel-digests")

    @override
    def image_as(self, key: str, digest: str) -> UInt8Array:
        return _checked(self.image(key), key, digest)

    @override
    def image_label(self, key: str) -> int:
        self._item(key)
        return _label(key)


def _label(key: str) -> int:
    return CLASSES.index(key.split("/")[1])


def _pixel_digest(image: UInt8Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def _checked(image: UInt8Array, key: str, digest: str) -> UInt8Array:
    if _pixel_digest(image) != digest:
        raise other_bytes(key)
    return image


def _file_pixel_digest(path: Path) -> str:
    try:
        return _pixel_digest(read_image(path))
    except UnreadableImageError:
        return unreadable_digest(path)


def _open(where: Path | None) -> Dataset:
    root = Path() if where is None else where
    for name in (PICKLES, BINARIES):
        for folder in (root / name, root / PICTURES / name):
            if folder.is_dir():
                return Cifar10Batches(folder)
    if any((root / PICTURES / split).is_dir() for split in _STEMS):
        return Cifar10Pictures(root / PICTURES)
    raise NotFoundError(
        f"data set 'cifar10': neither {PICKLES} nor {BINARIES} nor {PICTURES}/train in {root.absolute()}",
        hint=f"`featstore datasets fetch cifar10` gets it; or unpack {SOURCE} ({ARCHIVE_URL}) there, "
        "or name the folder that holds it with --data-root or $FEATSTORE_DATA",
    )


ENTRY = DatasetEntry(
    title=INFO.title,
    how_to_get=f"unpack {SOURCE} into the data root ({ARCHIVE_URL})",
    opener=_open,
    folder=".",
    probe=(PICKLES, BINARIES, f"{PICTURES}/{PICKLES}", f"{PICTURES}/{BINARIES}", f"{PICTURES}/train"),
)

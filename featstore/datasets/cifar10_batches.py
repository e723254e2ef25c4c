"""The batch files of CIFAR-10, both kinds: Python pickles, which are read without trusting them, and binary ones.

Images of both are stored as (n, 3, 32, 32) uint8; they leave as (n, 32, 32, 3).
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from featstore.datasets.base import UInt8Array
from featstore.errors import CorruptError, StorageError

SIDE_PX = 32
CLASS_COUNT = 10
_PIXELS = 3 * SIDE_PX * SIDE_PX
_MOST_BYTES = 256 * 2**20
"""A batch has 31 MB."""

Batch = tuple[npt.NDArray[np.int64], UInt8Array]
"""Labels (n,) in 0..9 and images (n, 32, 32, 3), RGB."""


def read_pickle(path: Path) -> Batch:
    """A file of ``cifar-10-batches-py``, such as ``data_batch_1``.

    Only what these files hold is taken from the pickle: dicts, lists, tuples, strings, numbers, and arrays of bytes,
    whose parts are put together here. Anything else in it, which a pickle could run code by, is refused.

    Raises:
        CorruptError: for a file that is damaged or names anything else.
        StorageError: for one that cannot be read.
    """
    try:
        value = _Unpickler(path).load()
        labels, data = value["labels"], value["data"]
        images = data.images()
        return _checked(path, np.asarray(labels), images)
    except (CorruptError, StorageError):
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle may raise anything
        _refuse(path, f"is no batch of CIFAR-10 ({type(error).__name__}: {error})", error)


def read_binary(path: Path) -> Batch:
    """A file of ``cifar-10-batches-bin``, such as ``data_batch_1.bin``: a label's byte and 3,072 of pixels an image.

    Raises:
        CorruptError: for a file of another length, or labels above 9.
        StorageError: for one that cannot be read.
    """
    data = np.frombuffer(_bytes(path), np.uint8)
    if not len(data) or len(data) % (1 + _PIXELS):
        _refuse(path, f"has {len(data)} bytes, which are no whole images of {1 + _PIXELS}")
    rows = data.reshape(-1, 1 + _PIXELS)
    return _checked(path, rows[:, 0].astype(np.int64), rows[:, 1:])


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            _refuse(path, f"has {size:,} bytes, far more than a batch of CIFAR-10")
        return path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def _checked(path: Path, labels: npt.NDArray[Any], pixels: UInt8Array) -> Batch:
    if labels.shape != (len(pixels),) or labels.dtype.kind != "i" or pixels.shape[1:] != (_PIXELS,):
        _refuse(path, f"has labels {labels.shape} {labels.dtype} and pixels {pixels.shape}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < CLASS_COUNT:
        _refuse(path, f"has labels {labels.min()}..{labels.max()}, outside 0..{CLASS_COUNT - 1}")
    images = pixels.reshape(-1, 3, SIDE_PX, SIDE_PX).transpose(0, 2, 3, 1)
    return labels.astype(np.int64), np.ascontiguousarray(images)


def _refuse(path: Path, what: str, cause: Exception | None = None) -> NoReturn:
    raise CorruptError(f"{path} {what}", hint="take the files from the archive again") from cause


class _Array:
    """Stands for ``numpy.ndarray`` in a pickle; numpy's code for pickled state was not made for strangers' files."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, by_columns, raw = state
        if version != 1 or not isinstance(dtype, _Dtype) or by_columns not in (False, 0):
            raise ValueError(f"an array of state {state[:-1]}")
        self._shape, self._raw = shape, raw

    def images(self) -> UInt8Array:
        """The bytes as uint8 of the shape that the pickle says; ValueError if they are not as many."""
        raw = self._raw.encode("latin-1") if isinstance(self._raw, str) else self._raw
        rows, columns = self._shape
        if rows < 0 or columns != _PIXELS:  # -1 would mean as many as there are
            raise ValueError(f"an array of shape {self._shape}")
        return np.frombuffer(raw, np.uint8).reshape(rows, columns)


class _Dtype:
    """Stands for ``numpy.dtype`` in a pickle, and only for that of bytes."""

    def __init__(self, name: str, *_: object) -> None:
        if name not in ("u1", "|u1", "uint8"):
            raise ValueError(f"an array of {name!r}")

    def __setstate__(self, state: object) -> None:
        """Byte order, alignment and flags: nothing that bytes have."""


def _reconstruct(kind: object, *_: object) -> _Array:
    if kind is not _Array:
        raise ValueError("an array of another class")
    return _Array()


def _encode(text: str, codec: str) -> bytes:
    """How Python 3 writes bytes in the pickles of Python 2."""
    if codec != "latin1":
        raise ValueError(f"codec {codec!r}")
    return text.encode(codec)


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
"""All that a batch's pickle may name, and what stands for it here; none of it is numpy's or Python's own."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path) -> None:
        super().__init__(io.BytesIO(_bytes(path)), encoding="latin1")
        self._path = path

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            _refuse(self._path, f"holds {module}.{name}, which no batch of CIFAR-10 does; nothing of it was run")
        return _KNOWN[module, name]

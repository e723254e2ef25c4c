"""One ``.npy`` file that holds the map of one image, read as what a stranger wrote.

Nothing is ever unpickled, a header is taken at its word only as far as the file bears it out, and a map is float16,
float32 or float64 with the axes (channel, y, x).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import stat
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from featstore.errors import FeatstoreError
from featstore.store import layout

SUFFIX = ".npy"
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_FILE_MAX_BYTES = 2 * layout.MAP_MAX_BYTES


class UnusableMapError(FeatstoreError):
    """A file holds no map that could be stored; the message is the reason, without the file's name."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says of its array."""

    shape: layout.Shape
    """(C, H, W)."""
    dtype: np.dtype[Any]
    """A floating type, in the file's byte order."""
    fortran: bool
    """Whether the first axis is the one that runs fastest."""
    offset_bytes: int
    """Where the array begins."""


def read_header(path: Path) -> Header:
    """The header of the file ``path``, held against the file's length; its array is not read.

    Raises:
        UnusableMapError: if it is no ``.npy`` file of one map, or is cut off.
    """
    try:
        with _open(path) as file:
            return _header(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise UnusableMapError(error.strerror or str(error)) from error


def read_map(path: Path) -> tuple[npt.NDArray[Any], str]:
    """The map (C, H, W) in the file ``path``, C-contiguous in the machine's byte order, and the file's SHA-256 (hex).

    Raises:
        UnusableMapError: as `read_header`.
    """
    try:
        with _open(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes > _FILE_MAX_BYTES:
                raise UnusableMapError(f"it has {size_bytes} bytes, which no sound map has")
            data = file.read()
    except OSError as error:
        raise UnusableMapError(error.strerror or str(error)) from error
    header = _header(io.BytesIO(data), len(data))
    flat = np.frombuffer(data, dtype=header.dtype, offset=header.offset_bytes)
    array = flat.reshape(header.shape, order="F" if header.fortran else "C")
    native = np.ascontiguousarray(array, dtype=header.dtype.newbyteorder("="))
    return native, hashlib.sha256(data).hexdigest()


def _open(path: Path) -> IO[bytes]:
    # A pipe would never answer: it is opened without waiting, and refused.
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UnusableMapError("it is no regular file")
    return os.fdopen(handle, "rb")


def _header(file: IO[bytes], size_bytes: int) -> Header:
    """The checked header of a file of ``size_bytes``, which is at its beginning."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            number = ".".join(map(str, version))
            raise UnusableMapError(f"it is of version {number} of the .npy format, which maps never are")
        shape, fortran, dtype = _HEADERS[version](file)
    except (ValueError, TypeError, RecursionError, MemoryError):
        raise UnusableMapError("it is no .npy file, or its header is damaged") from None
    if dtype.hasobject:
        raise UnusableMapError("it holds Python objects, which would have to be unpickled")
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise UnusableMapError(f"its element type is {dtype}; float16, float32 and float64 can be stored")
    if len(shape) != 3 or min(shape) < 1:
        raise UnusableMapError(f"its shape is {shape}; a map has three axes, (channel, y, x)")
    needed_bytes, there_bytes = math.prod(shape) * dtype.itemsize, size_bytes - file.tell()
    if math.prod(shape) * 4 > layout.MAP_MAX_BYTES:
        raise UnusableMapError(f"its shape is {shape}, which no sound map has")
    if there_bytes != needed_bytes:
        wrong = "it is cut off" if there_bytes < needed_bytes else "something follows the array"
        raise UnusableMapError(f"{wrong}: {there_bytes} bytes, where {shape} {dtype} takes {needed_bytes}")
    channels, height, width = shape
    return Header(shape=(channels, height, width), dtype=dtype, fortran=bool(fortran), offset_bytes=file.tell())

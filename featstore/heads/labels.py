"""Label maps of a whole data set in little memory.

N images, h w height and width of the label grid.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError

_FASTEST = 1


class LabelMaps(Protocol):
    """Label maps (N, h, w) uint8, read image by image: a numpy array, or `PackedLabels`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, h, w)."""

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        """uint8."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> npt.NDArray[np.uint8]: ...


class PackedMap:
    """One label map, (h, w) uint8, compressed: most are a few areas, and take one to five percent of their size."""

    __slots__ = ("_data", "size")

    def __init__(self, mask: npt.NDArray[np.uint8]) -> None:
        """Compress.

        Args:
            mask: (h, w) uint8.
        """
        self.size = mask.shape
        self._data = zlib.compress(np.ascontiguousarray(mask).data, _FASTEST)

    def open(self) -> npt.NDArray[np.uint8]:
        """(h, w) uint8, a new read-only array."""
        return np.frombuffer(zlib.decompress(self._data), np.uint8).reshape(self.size)


class PackedLabels:
    """Label maps of N rows, each compressed; rows without one are wholly ``ignore_label``."""

    dtype = np.dtype(np.uint8)

    def __init__(self, maps: Iterable[PackedMap | None], size: tuple[int, int], *, ignore_label: int = 255) -> None:
        """Take maps over without a copy.

        Args:
            maps: one a row; None: the row has none.
            size: (h, w), the same for all.
            ignore_label: label of pixels that do not count.

        Raises:
            BadRequestError: if a map has another size.
        """
        self._maps = tuple(maps)
        self._none = np.full(size, ignore_label, np.uint8)
        self._none.flags.writeable = False
        for row, one in enumerate(self._maps):
            if one is not None and one.size != tuple(size):
                raise BadRequestError(f"the label map of row {row} is {one.size}, not {tuple(size)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, h, w)."""
        return (len(self._maps), *self._none.shape)

    def __len__(self) -> int:
        return len(self._maps)

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        """(h, w) uint8 labels of a row, read-only; IndexError outside 0..N-1."""
        one = self._maps[row]
        return self._none if one is None else one.open()

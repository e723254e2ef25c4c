"""Where in one image the feature of a point in another image is found again.

As in the demonstration of DIFT (Tang et al., "Emergent Correspondence from Image Diffusion", NeurIPS 2023): maps are
taken as upsampled to the image's size, and cosines compared at every pixel. Nothing is upsampled, though: an
interpolated vector's product with another is the interpolated product, and its length follows from products of
neighbours, so that a native map is gone through once.

C channels, h w map height and width, H W image height and width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError

Float64Array = npt.NDArray[np.float64]
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The pixel whose feature is most like that of the point."""

    y: int
    """Row in the other image."""
    x: int
    """Column in the other image."""
    cosine: float
    """Of the two features, -1..1."""
    heat: Float64Array
    """(H, W) cosine of every pixel."""


def vector_at(maps: npt.NDArray[Any], y: int, x: int, size: Size) -> Float64Array:
    """The feature (C,) at pixel (y, x) of an image of ``size`` (H, W), between the cells of maps (C, h, w).

    Raises:
        BadRequestError: for a pixel outside the image.
    """
    if not (0 <= y < size[0] and 0 <= x < size[1]):
        raise BadRequestError(f"point ({y}, {x}) is outside the image of {size[0]} x {size[1]} px")
    rows, columns = _Line.of(maps.shape[1], size[0]).at(y), _Line.of(maps.shape[2], size[1]).at(x)
    wide = maps[:, [rows.lower, rows.upper]][:, :, [columns.lower, columns.upper]].astype(np.float64)
    vector: Float64Array = np.einsum(
        "cyx,y,x->c", wide, [1 - rows.share, rows.share], [1 - columns.share, columns.share]
    )
    return vector


def cosines(vector: Float64Array, maps: npt.NDArray[Any], size: Size) -> Float64Array:
    """Cosine of ``vector`` (C,) with the feature at every pixel, (H, W); 0 where a feature is zero."""
    wide = maps.astype(np.float64)
    rows, columns = _Line.of(maps.shape[1], size[0]), _Line.of(maps.shape[2], size[1])
    y, x = np.ix_(np.arange(size[0]), np.arange(size[1]))
    down, across = rows.share[y], columns.share[x]
    weight = {
        (0, 0): (1 - down) * (1 - across),
        (0, 1): (1 - down) * across,
        (1, 0): down * (1 - across),
        (1, 1): down * across,
    }
    row, column = (rows.lower[y], rows.upper[y]), (columns.lower[x], columns.upper[x])
    product = np.einsum("c,cyx->yx", vector, wide)
    along = sum(weight[i, j] * product[row[i], column[j]] for i in (0, 1) for j in (0, 1))
    squared = np.zeros(size)
    products = {step: _products(wide, *step) for step in ((0, 0), (0, 1), (1, 0), (1, 1), (1, -1))}
    corners = list(weight)
    for place, one in enumerate(corners):
        squared += weight[one] ** 2 * products[0, 0][row[one[0]], column[one[1]]]
        for other in corners[place + 1 :]:
            step = other[0] - one[0], other[1] - one[1]
            # a clamped neighbour has weight 0, so that which product stands there does not matter
            squared += 2 * weight[one] * weight[other] * products[step][row[one[0]], column[one[1]]]
    length = np.sqrt(np.maximum(squared, 0)) * np.sqrt(vector @ vector)
    heat: Float64Array = np.divide(along, length, out=np.zeros(size), where=length > 0).clip(-1, 1)
    return heat


def nearest(
    source: npt.NDArray[Any], point: tuple[int, int], source_size: Size, target: npt.NDArray[Any], target_size: Size
) -> Match:
    """The pixel of the target that is most like a point of the source.

    Args:
        source: maps (C, h, w) of one image, finite.
        point: (y, x), a pixel of that image.
        source_size: (H, W) of that image.
        target: maps (C, h', w') of the same layer of another image, finite.
        target_size: (H', W') of that image.

    Raises:
        BadRequestError: for maps of different channels, values that are not finite, a point outside the image.
    """
    if source.ndim != 3 or target.ndim != 3 or len(source) != len(target):
        raise BadRequestError(f"maps {source.shape} and {target.shape} are not (C, h, w) of the same channels")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise BadRequestError("maps hold values that are not finite", hint="featstore verify finds where")
    heat = cosines(vector_at(source, *point, source_size), target, target_size)
    y, x = (int(value) for value in np.unravel_index(int(heat.argmax()), heat.shape))
    return Match(y=y, x=x, cosine=float(heat[y, x]), heat=heat)


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    lower: int
    upper: int
    share: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Line:
    """Between which cells of a line its pixels lie, as bilinear interpolation without aligned corners has it."""

    lower: npt.NDArray[np.intp]
    upper: npt.NDArray[np.intp]
    share: Float64Array
    """Weight of the upper cell."""

    @classmethod
    def of(cls, cells: int, pixels: int) -> _Line:
        position = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
        lower = np.floor(position).astype(np.intp)
        return cls(lower, np.minimum(lower + 1, cells - 1), position - lower)

    def at(self, pixel: int) -> _Place:
        return _Place(int(self.lower[pixel]), int(self.upper[pixel]), float(self.share[pixel]))


def _products(maps: Float64Array, down: int, across: int) -> Float64Array:
    """Product of each cell's vector with its neighbour's that is so far down (0, 1) and across (-1..1), (h, w)."""
    height, width = maps.shape[1:]
    y, x = np.minimum(np.arange(height) + down, height - 1), np.clip(np.arange(width) + across, 0, width - 1)
    product: Float64Array = np.einsum("cyx,cyx->yx", maps, maps[:, y][:, :, x])
    return product

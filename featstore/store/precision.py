"""What a map's numbers become on disk, and what a reader makes of them again.

``float16`` and ``float32`` are stored as they are. ``int8`` keeps whole numbers q and one scale an image and
channel, so that x = q * scale: the scale is the channel's largest magnitude / 127, and q is x / scale, rounded half
to even. So no element is off by more than half a scale, a channel of zeros has the scale 0 and reads as exact
zeros, and the largest magnitude keeps its value. A channel whose scale would be no normal float32 (magnitudes below
1.5e-36) counts as zeros. Readers give the product, formed in float32, as float16.

Shapes: n images, C channels, H W map height and width.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError, unknown_name
from featstore.store import layout

Q_MAX = 127
"""Largest magnitude of a stored int8; -128 is not used, so that both signs reach as far."""
SCALE_MIN = float(np.finfo(np.float32).smallest_normal)
"""Scales below it are 0."""

_TABLE_MIN_VALUES = 512
"""Values of a channel from which on a table of its 256 products beats multiplying each, in numpy."""
_PART_VALUES = 1 << 15
"""Values that are multiplied at once; torch takes several threads for more."""
_CODES = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)

Scales = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """How one of the recipe's precisions is kept."""

    name: str
    """As in a recipe."""
    stored: np.dtype[Any]
    """Element type on disk."""
    read: np.dtype[Any]
    """Element type of what readers return."""
    scaled: bool = False
    """Whether a sidecar array of scales belongs to the maps."""


PRECISIONS: Mapping[str, Precision] = {
    "float16": Precision(name="float16", stored=layout.DTYPES["float16"], read=np.dtype(np.float16)),
    "float32": Precision(name="float32", stored=layout.DTYPES["float32"], read=np.dtype(np.float32)),
    "int8": Precision(name="int8", stored=layout.DTYPES["int8"], read=np.dtype(np.float16), scaled=True),
}


def of(name: str) -> Precision:
    """The precision of that name.

    Raises:
        BadRequestError: if there is none.
    """
    if name not in PRECISIONS:
        raise unknown_name("precision", name, PRECISIONS)
    return PRECISIONS[name]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """Maps of n images as int8 stores them; indexing takes images, as of an array."""

    values: npt.NDArray[np.int8]
    """(n, C, H, W), -127..127."""
    scales: Scales
    """(n, C), 0 or positive, finite."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.values)

    def __getitem__(self, images: Any) -> Quantised:
        """Those of ``images``: a slice, a mask or a list of numbers."""
        return Quantised(self.values[images], self.scales[images])

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes


StoredMaps = npt.NDArray[Any] | Quantised
"""Maps of n images as a run keeps them: (n, C, H, W) in the stored element type, or `Quantised`."""


def quantise(maps: npt.NDArray[Any]) -> Quantised:
    """Floats as int8 and scales, as the module says.

    Args:
        maps: (n, C, H, W) in any floating type, finite.

    Raises:
        BadRequestError: for maps that are not finite, or that would overflow float16 when they are read.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        wide = np.asarray(maps, dtype=np.float32)
        scales = np.abs(wide).max(axis=(2, 3), initial=0.0) / np.float32(Q_MAX)
        _check(scales.max(axis=1, initial=0.0) * np.float32(Q_MAX), PRECISIONS["int8"])
    scales[scales < SCALE_MIN] = 0.0
    quotients = wide / np.where(scales == 0.0, np.float32(1.0), scales)[:, :, None, None]
    return Quantised(np.rint(quotients, out=quotients).astype(np.int8), scales)


def encoded(maps: npt.NDArray[Any], name: str) -> StoredMaps:
    """Floats as a run of precision ``name`` stores them: what `Run.write_block` takes.

    Args:
        maps: (n, C, H, W) in any floating type, finite.
        name: of the precision.

    Raises:
        BadRequestError: for maps that are not finite, or that overflow the precision.
    """
    precision = of(name)
    if precision.scaled:
        return quantise(maps)
    with np.errstate(over="ignore", invalid="ignore"):
        _check(np.abs(np.asarray(maps)).max(axis=(1, 2, 3), initial=0.0), precision)
    return np.asarray(maps, dtype=precision.stored)


def image_bytes(shape: tuple[int, int, int], stored: np.dtype[Any]) -> int:
    """Bytes of one image of shape (C, H, W): of its map and, where that is int8, of its scales."""
    return math.prod(shape) * stored.itemsize + (4 * shape[0] if stored == layout.DTYPES["int8"] else 0)


def _check(peaks: npt.NDArray[Any], precision: Precision) -> None:
    """Refuse images whose largest magnitudes (n,) are not finite once they are read."""
    for image in np.flatnonzero(~np.isfinite(peaks.astype(precision.read))).tolist():
        raise BadRequestError(f"image {image} of these maps: {unfit(float(peaks[image]), precision.read.name)}")


def unfit(peak: float, read: str) -> str:
    """Why a map whose largest magnitude is ``peak`` cannot be stored; ``read`` is the type that it overflows."""
    return f"overflow of {read} (magnitude {peak:.3g})" if np.isfinite(peak) else "NaN or infinity"


def sound(scales: Scales) -> npt.NDArray[np.bool_]:
    """Which of the scales a writer may have stored: finite, not negative, no product beyond float16."""
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite((scales * np.float32(Q_MAX)).astype(np.float16))
    allowed: npt.NDArray[np.bool_] = finite & (scales >= 0.0)
    return allowed


def dequantise(stored: Quantised, out: npt.NDArray[np.float16]) -> None:
    """float16(q * scale), the product in float32.

    Where torch is loaded already it does this in hardware; numpy rounds to float16 in software, to the same bits.

    Args:
        stored: n maps, C-contiguous, their scales `sound`.
        out: (n, C, H, W), C-contiguous; filled.
    """
    if out.size:
        (_with_torch if "torch" in sys.modules else _with_numpy)(stored, out)


def _with_torch(stored: Quantised, out: npt.NDArray[np.float16]) -> None:
    # Loaded already; if another thread is at it, this waits until it is done.
    import torch

    channels = stored.scales.size
    source = torch.from_numpy(stored.values).reshape(channels, -1)
    factors = torch.from_numpy(stored.scales).reshape(channels, 1)
    target = torch.from_numpy(out).reshape(channels, -1)
    for some in _parts(channels, source.shape[1]):
        target[some].copy_(source[some].float().mul_(factors[some]))


def _with_numpy(stored: Quantised, out: npt.NDArray[np.float16]) -> None:
    channels = stored.scales.size
    source, factors = stored.values.reshape(channels, -1), stored.scales.reshape(channels, 1)
    target = out.reshape(channels, -1)
    with np.errstate(over="ignore"):  # of -128, which is never stored
        for some in _parts(channels, source.shape[1]):
            if source.shape[1] < _TABLE_MIN_VALUES:
                target[some] = source[some] * factors[some]
                continue
            tables = (factors[some] * _CODES).astype(np.float16)
            for table, code, one in zip(tables, source[some].view(np.uint8), target[some], strict=True):
                np.take(table, code, out=one, mode="clip")


def _parts(channels: int, values: int) -> Iterator[slice]:
    """Channels of so many values in parts that stay in the processor's cache.

    Nor does torch think them worth its threads, which several readers at once would have wait for each other.
    """
    step = max(1, _PART_VALUES // values)
    return (slice(first, first + step) for first in range(0, channels, step))

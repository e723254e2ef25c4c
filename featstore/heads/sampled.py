"""A few labelled pixels of each of many images, in the place of whole maps.

A pixel head holds the native maps of its training images, which is the least for a few and too much for thousands. Of
those it can be given some pixels each, drawn at random: their vectors are gathered once, block by block, wherever the
blocks are read, and fit into memory. Which pixels they are depends on the seed and the image's row alone.

P pixels, K runs in the bucket, C channels of a run, A channels beside them, H W map height and width, h w height and
width of the label grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featstore.errors import BadRequestError
from featstore.heads.gather import gather
from featstore.heads.reading import check_finite
from featstore.heads.standardise import Standardise
from featstore.store.read import LayerReader

_SLICE = 4096
Pixels = npt.NDArray[np.int64]
"""(P,) pixels of one label map, y * w + x, ascending."""


def draw_pixels(labels: npt.NDArray[np.uint8], count: int, *, seed: int, row: int, ignore_label: int = 255) -> Pixels:
    """Some labelled pixels of an image, all if it has fewer.

    Args:
        labels: (h, w) uint8.
        count: how many.
        seed: of the draw.
        row: of the image.
        ignore_label: label of pixels that do not count.
    """
    labelled = np.flatnonzero(labels.reshape(-1) != ignore_label)
    if len(labelled) <= count:
        return labelled
    chosen = np.random.default_rng([seed, row]).choice(len(labelled), count, replace=False, shuffle=False)
    chosen.sort()
    drawn: Pixels = labelled[chosen]
    return drawn


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gathering:
    """Reads maps of a few rows and keeps the vectors of chosen pixels; small, and picklable."""

    runs: tuple[Mapping[str, LayerReader], ...]
    """For each of K runs what reads its layers."""
    beside: Mapping[str, LayerReader]
    """What reads each layer beside the bucket, in the order of their channels."""
    size: tuple[int, int]
    """(h, w) of the label grid."""

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel's vector, float32."""
        channels = sum(reader.shape[0] for run in self.runs for reader in run.values())
        return 4 * (channels + sum(reader.shape[0] for reader in self.beside.values()))

    def __call__(
        self, rows: Sequence[int], pixels: Sequence[Pixels]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Vectors of the pixels of some rows, image by image: runs (P, K, C) and what is beside them (P, A).

        Raises:
            NotCommittedError, CorruptError, StorageError: if maps cannot be read.
            BadRequestError: for NaN or infinity in one.
        """
        parts = [self._image(row, some) for row, some in zip(rows, pixels, strict=True)]
        return np.concatenate([one for one, _ in parts]), np.concatenate([other for _, other in parts])

    def _image(self, row: int, pixels: Pixels) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        y, x = (torch.from_numpy(part) for part in np.divmod(pixels, self.size[1]))

        def vectors(readers: Mapping[str, LayerReader]) -> Tensor:
            found = []
            for name, reader in readers.items():
                maps = check_finite(reader.rows([row]), np.array([row]), f"layer {name} of {reader.path}")
                found.append(gather(torch.from_numpy(maps[0]), y, x, size=self.size))
            return torch.cat(found, 1) if found else torch.empty(len(pixels), 0)

        runs = torch.stack([vectors(run) for run in self.runs], 1)
        return runs.numpy(), vectors(self.beside).numpy()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PixelSample:
    """Vectors and labels of P pixels of many images."""

    runs: npt.NDArray[np.float32]
    """(P, K, C)."""
    beside: npt.NDArray[np.float32]
    """(P, A)."""
    labels: npt.NDArray[np.uint8]
    """(P,)."""
    images: int
    """Of how many they are."""

    def __post_init__(self) -> None:
        """Refuse what does not fit together."""
        if not len(self.runs) == len(self.beside) == len(self.labels):
            raise BadRequestError(
                f"{len(self.runs)} vectors of runs, {len(self.beside)} beside them and {len(self.labels)} labels"
            )


class SampledTables:
    """A `PixelSample` as members train on it: what `PixelTables` is to whole maps. Pixels are named 0..P-1.

    Args:
        sample: the vectors.
        device: where they live.
    """

    def __init__(self, sample: PixelSample, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._runs = torch.from_numpy(sample.runs).to(device)
        self._beside = torch.from_numpy(sample.beside).to(device)

    @property
    def width(self) -> int:
        """Values of a pixel, K * C + A."""
        return self._runs.shape[1] * self._runs.shape[2] + self._beside.shape[1]

    def moments(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Mean and standard deviation of every channel over the pixels: of runs, both (K, C), and beside, both (A,)."""
        return _moments(self._runs), _moments(self._beside)

    def standardise(self, by: Standardise) -> None:
        """Make `gather` give standardised vectors from now on."""
        self._runs.sub_(by.run_mean).mul_(by.run_scale)
        self._beside.sub_(by.attention_mean).mul_(by.attention_scale)

    def empty(self, pixels: int) -> tuple[Tensor, Tensor]:
        """Memory for the vectors of this many pixels: (pixels, K, C) and (pixels, A) float32."""
        return (
            torch.empty(pixels, *self._runs.shape[1:], device=self.device),
            torch.empty(pixels, self._beside.shape[1], device=self.device),
        )

    def gather(self, pixels: Tensor, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Vectors of pixels (P,) int64: runs (P, K, C) and beside (P, A), float32; see `PixelTables.gather`."""
        runs, beside = into or self.empty(len(pixels))
        torch.index_select(self._runs, 0, pixels, out=runs)
        torch.index_select(self._beside, 0, pixels, out=beside)
        return runs, beside


def _moments(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, a slice at a time, so that no wide copy of everything is made."""
    total = torch.zeros(vectors.shape[1:], dtype=torch.float64, device=vectors.device)
    squares = torch.zeros_like(total)
    for part in torch.split(vectors, _SLICE):
        total += part.sum(0, dtype=torch.float64)
    mean = total / max(1, len(vectors))
    for part in torch.split(vectors, _SLICE):
        squares += (part.double() - mean).square_().sum(0)
    return mean.float(), (squares / max(1, len(vectors))).sqrt().float()

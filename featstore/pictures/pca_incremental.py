"""A basis for pictures fitted on maps that come in one after the other, so that a store of any size fits in memory.

N images, C channels, H W map height and width, P pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from featstore.errors import BadRequestError
from featstore.pictures.pca import CLIPPED_PERCENT, FIT_PIXELS, FloatArray, PcaBasis, some_pixels

_CHUNK_PIXELS = 2048
_CARRIED = 16
"""Directions that are carried from chunk to chunk: three alone would lose what shows only later."""


class BasisFit:
    """Takes in maps and gives the three directions in which they vary most.

    What is held is a chunk of pixel vectors, a few directions, and a sample of pixels for the range that is shown:
    no more for many images than for few.

    Args:
        pixels: how many pixel vectors are taken of all that comes in, about.
        parts: how many times maps will be added; each gives its share of the pixels.
        seed: of the choice of pixels.
    """

    def __init__(self, *, parts: int, pixels: int = FIT_PIXELS, seed: int = 0) -> None:
        self._share = max(1, -(-pixels // max(1, parts)))
        self._keep = max(1, -(-_CHUNK_PIXELS // max(1, parts)))
        self._rng = np.random.default_rng(seed)
        self._waiting: list[FloatArray] = []
        self._kept: list[FloatArray] = []
        self._range: tuple[FloatArray, FloatArray] | None = None
        self._pca: Any = None

    def add(self, maps: FloatArray) -> None:
        """Take in maps (N, C, H, W) of any N, H, W; C is always the same.

        Raises:
            BadRequestError: for other shapes, or values that are not finite.
        """
        if maps.ndim != 4 or not maps.size or (self._range is not None and maps.shape[1] != len(self._range[0])):
            wanted = "any" if self._range is None else len(self._range[0])
            raise BadRequestError(f"maps are {maps.shape}; the fit takes (N, C, H, W) with C {wanted}")
        pixels = some_pixels(maps, self._share, self._rng)
        if not np.isfinite(pixels).all():
            raise BadRequestError("maps hold values that are not finite", hint="show images that were extracted")
        low, high = pixels.min(axis=0), pixels.max(axis=0)
        if self._range is not None:
            low, high = np.minimum(low, self._range[0]), np.maximum(high, self._range[1])
        self._range = (low, high)
        order = self._rng.permutation(len(pixels))
        self._kept.append(pixels[order[: self._keep]].astype(np.float32))
        self._waiting.append(pixels[order])
        # One chunk always stays: the last one fitted then never has fewer pixels than directions.
        while sum(map(len, self._waiting)) >= 2 * _CHUNK_PIXELS:
            waiting = np.concatenate(self._waiting)
            self._fit(waiting[:_CHUNK_PIXELS])
            self._waiting = [waiting[_CHUNK_PIXELS:]]

    def _fit(self, pixels: FloatArray) -> None:
        from sklearn.decomposition import IncrementalPCA

        if self._pca is None:
            self._pca = IncrementalPCA(n_components=min(_CARRIED, *pixels.shape))
        with np.errstate(invalid="ignore"):  # pixels that are all alike so far have no shares of a variance
            self._pca.partial_fit(pixels)

    def basis(self) -> PcaBasis:
        """The basis of all that was added; nothing can be added any more.

        Raises:
            BadRequestError: if nothing was added.
        """
        if self._range is None:
            raise BadRequestError("there are no maps to fit a basis on")
        channels = len(self._range[0])
        components, low, high = np.zeros((3, channels)), np.zeros(3), np.ones(3)
        if not (self._range[1] > self._range[0]).any():
            return PcaBasis(mean=self._range[0], components=components, low=low, high=high, explained=())
        self._fit(np.concatenate(self._waiting))
        self._waiting = []
        count = min(3, len(self._pca.components_))
        components[:count] = self._pca.components_[:count]
        coordinates = (np.concatenate(self._kept) - self._pca.mean_) @ components[:count].T
        low[:count] = np.percentile(coordinates, CLIPPED_PERCENT, axis=0)
        high[:count] = np.percentile(coordinates, 100 - CLIPPED_PERCENT, axis=0)
        explained = tuple(float(value) for value in self._pca.explained_variance_ratio_[:count])
        return PcaBasis(mean=self._pca.mean_, components=components, low=low, high=high, explained=explained)

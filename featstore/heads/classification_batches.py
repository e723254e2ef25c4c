"""Batches that a classification head is trained on: from memory where the maps fit, else from a stream.

B images of a batch, D length of an image's vector.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featstore.heads.features import Features
from featstore.heads.reading import Rows
from featstore.heads.stream import WINDOW_BYTES, Maps, Stream, read_maps


class MapBatches:
    """Maps in the order of a `Stream`. What fits into its window is read once and kept; the batches are the same."""

    def __init__(
        self, features: Features, rows: Rows, *, batch: int, seed: int, window_bytes: int = WINDOW_BYTES
    ) -> None:
        self._stream = Stream(features=features, rows=rows, batch=batch, seed=seed, window_bytes=window_bytes)
        own = np.unique(np.asarray(rows, np.int64))
        row_bytes = sum(int(np.prod(array.shape[1:])) * array.dtype.itemsize for _, array in features.arrays())
        self._held = read_maps(features, own) if len(own) * row_bytes <= window_bytes else None
        self.count = len(own)
        """Images of an epoch."""

    @property
    def held(self) -> bool:
        """Whether the maps are kept in memory."""
        return self._held is not None

    def orders(self, epoch: int) -> Iterator[npt.NDArray[np.int64]]:
        """The rows of each batch of an epoch."""
        order = np.concatenate(self._stream.windows(epoch))
        return iter(np.split(order, range(self._stream.batch, len(order), self._stream.batch)))

    def epoch(self, number: int) -> Iterator[Maps]:
        """The batches of an epoch.

        Raises:
            FeatstoreError: what reading raises.
        """
        if self._held is None:
            yield from self._stream.epoch(number)
            return
        for rows in self.orders(number):
            yield self._held.take(np.searchsorted(self._held.rows, rows))


class VectorBatches:
    """Vectors that do not change in training, in the order of the maps that they came from."""

    def __init__(self, maps: MapBatches, rows: npt.NDArray[np.int64], vectors: Tensor) -> None:
        order = np.argsort(rows)
        self._maps = maps
        self._rows = rows[order]
        self._vectors = vectors[torch.from_numpy(order).to(vectors.device)]

    def epoch(self, number: int) -> Iterator[tuple[npt.NDArray[np.int64], Tensor]]:
        """Rows (B,) and their vectors (B, D), batch by batch; nothing is read."""
        for rows in self._maps.orders(number):
            yield rows, self._vectors[torch.from_numpy(np.searchsorted(self._rows, rows)).to(self._vectors.device)]

"""Which features of a data set's images a store has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from featstore.datasets import Dataset
from featstore.store import Run, StoredDataset


class Presence:
    """The images that are wanted, found in a store's sample table once for all runs.

    Args:
        dataset: lists the images as they are today.
        wanted: indices into its samples (n).
        stored: the data set in the store; None: it is not there.
    """

    def __init__(self, dataset: Dataset, wanted: Sequence[int], stored: StoredDataset | None) -> None:
        self._count = len(wanted)
        self._positions = np.zeros(0, dtype=int)
        self._rows = np.zeros(0, dtype=int)
        if stored is None or not wanted:
            return
        samples = [dataset.samples[index] for index in wanted]
        # Of all samples, as a table that was listed before has them in the same order.
        rows = stored.rows([sample.key for sample in dataset.samples])[list(wanted)]
        known = np.flatnonzero(rows >= 0)
        if not len(known):
            return
        today = np.frombuffer(bytes.fromhex("".join(samples[position].digest for position in known)), dtype=np.uint8)
        then = stored.samples.digest_bytes(0, len(stored.samples))[rows[known]]
        same = (today.reshape(-1, then.shape[1]) == then).all(axis=1)
        self._positions = known[same]
        self._rows = rows[self._positions]

    def missing(self, run: Run | None, layers: Iterable[str]) -> dict[str, np.ndarray]:
        """For each of ``layers`` a mask (n,): True where the store lacks the row of today's image."""
        missing = {name: np.ones(self._count, dtype=bool) for name in layers}
        if run is not None and len(self._positions):
            for name, valid in run.valid_each([name for name in missing if name in run.layers]).items():
                missing[name][self._positions] = ~valid[self._rows]
        return missing

"""What became of one run of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from featstore.pipelines.plan import PlannedRun
from featstore.store import Run

if TYPE_CHECKING:
    from featstore.extraction.reduce import Projection


@dataclasses.dataclass(eq=False)
class RunOutcome:
    """One run of the plan, while and after it is made."""

    planned: PlannedRun
    run: Run
    rows: np.ndarray
    """Row in the store's table of each wanted image."""
    missing: dict[str, np.ndarray]
    """For each layer, a mask (N,) over the wanted samples: True where a row is still to be computed."""
    projections: Mapping[str, Projection] = dataclasses.field(default_factory=dict)
    """What reduces layers while they are computed."""
    computed: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    """Keys of images that could not be extracted, each with the reason."""

    @property
    def todo(self) -> np.ndarray:
        """Mask (N,) over the wanted samples: True where at least one layer's row is still to be computed."""
        todo: np.ndarray = np.logical_or.reduce(list(self.missing.values()))
        return todo

    @property
    def reduced(self) -> dict[str, dict[str, float]]:
        """Layers asked for that are reduced: channels of the model's layer, and share of the variance that is kept."""
        found = {name: self.run.layers[name].reduced for name in self.planned.layers}
        return {name: {"channels": one.channels, "explained": one.explained} for name, one in found.items() if one}

    @cached_property
    def blocks(self) -> np.ndarray:
        """Block of each wanted image (N,)."""
        return self.rows // self.run.block_length

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.rows, kind="stable")

    def positions(self, block: int) -> np.ndarray:
        """Positions in the wanted samples of the images of a block (n,), in the order of their rows."""
        first, last = np.searchsorted(self.blocks, [block, block + 1], sorter=self._order)
        positions: np.ndarray = self._order[first:last]
        return positions

    def lacking(self, block: int) -> np.ndarray:
        """Those of `positions` (n,) of which at least one layer's row is still to be computed."""
        positions = self.positions(block)
        # Not `todo`, which looks at all N.
        lacking: np.ndarray = positions[np.logical_or.reduce([mask[positions] for mask in self.missing.values()])]
        return lacking

    def look_again(self, block: int, positions: np.ndarray) -> np.ndarray:
        """Which of these images (n,), all of one block, still lack a row; `missing` is brought up to date.

        Args:
            block: number of the block.
            positions: in the wanted samples (n,).
        """
        slots = self.rows[positions] - block * self.run.block_length
        lacking = np.zeros(len(positions), dtype=bool)
        for layer, valid in self.run.valid_block(block, list(self.missing)).items():
            self.missing[layer][positions] &= ~valid[slots]
            lacking |= self.missing[layer][positions]
        return lacking

    def done(self, positions: np.ndarray) -> None:
        """Nothing is to be computed for these images any more: they are stored, or cannot be."""
        for mask in self.missing.values():
            mask[positions] = False

"""What a forward pass is asked for, and which passes can share batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError
from featstore.extraction.reduce import Projection
from featstore.techniques.base import Steering

DENOISE_FINE = 50
"""A denoising over at most so many timesteps takes every one of them; a longer one every tenth, as the seed code."""
_COARSE_STEP = 10


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One run's share of the images at hand."""

    steering: int
    """Index into the extractor's steerings."""
    rows: npt.NDArray[np.intp]
    """(n,) indices into the images."""
    timestep: int
    """What the network is fed when the layers are read."""
    seed: int = 0
    """Seed of the run's noise."""
    captions: Sequence[str] | None = None
    """One text a row, for a steering without a fixed prompt; otherwise not used."""
    denoise_from: int | None = None
    """Timestep that is noised to, and denoised from down to ``timestep``; None: one noised pass."""
    noise_ensemble: int = 1
    """Draws of the noise; the maps are averaged over them."""
    projections: Mapping[str, Projection] | None = None
    """What reduces the channels of layers, by their names; on the backbone's device."""

    def check(self, timesteps: int) -> None:
        """Refuse what no pass can be.

        Raises:
            BadRequestError: for timesteps out of range or order, no rows, or an ensemble of less than one.
        """
        if not 0 <= self.timestep < timesteps:
            raise BadRequestError(f"timestep {self.timestep} is outside 0..{timesteps - 1}")
        start = self.denoise_from
        if start is not None and not self.timestep < start < timesteps:
            raise BadRequestError(
                f"denoising from timestep {start} is outside {self.timestep + 1}..{timesteps - 1}: it ends at the "
                f"timestep of the pass, {self.timestep}"
            )
        if self.noise_ensemble < 1:
            raise BadRequestError(f"a noise ensemble of {self.noise_ensemble} is below 1")
        if self.captions is not None and len(self.captions) != len(self.rows):
            raise BadRequestError(f"{len(self.captions)} captions for {len(self.rows)} rows")
        if not len(self.rows):
            raise BadRequestError("a pass of no rows")


def denoising(start: int, timestep: int) -> tuple[int, ...]:
    """Timesteps of a denoising, from ``start`` down to ``timestep``, both included.

    The seed code's choice: from 61 to 50 all twelve; over more than `DENOISE_FINE` timesteps every tenth.
    """
    step = 1 if start - timestep <= DENOISE_FINE else _COARSE_STEP
    return (*range(start, timestep, -step), timestep)


def sharing(passes: Sequence[Pass], steerings: Sequence[Steering]) -> list[list[int]]:
    """Indices of passes in lists that can share batches: the same modules act, in the same number of steps."""
    groups: dict[Any, list[int]] = {}
    for index, one in enumerate(passes):
        steering = steerings[one.steering]
        path = None if one.denoise_from is None else (one.denoise_from, one.timestep)
        weights = (steering.loras, steering.controlnets, steering.ip_adapters)
        key = (weights, steering.guidance, steering.prompt_chunks, path)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One row of a batch."""

    index: int
    """Of the pass."""
    position: int
    """In the pass's rows."""
    row: int
    """In the images."""
    draw: int
    """Of the noise."""


def items(passes: Sequence[Pass], indices: Sequence[int]) -> list[Item]:
    """All rows of some passes, pass by pass, draws of one image side by side."""
    return [
        Item(index, position, int(row), draw)
        for index in indices
        for position, row in enumerate(passes[index].rows)
        for draw in range(passes[index].noise_ensemble)
    ]

"""How much a benchmark measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """How much to measure."""

    images: int | None = None
    """Images of toyhorse, or most images of what grows with them; None: all, or as many as the benchmark says."""
    repeats: int = 3
    """Pairs of measurements; medians are reported."""
    max_steps: int | None = None
    """Steps of the head's training at most; None: until its loss stops improving."""
    batch_size: int | None = None
    """Rows of every forward pass; None: as an extraction chooses."""
    device: str | None = None
    """Device; None: a GPU where there is one."""
    beside: Path | None = None
    """Temporary stores are made beside this one, so that its disk is measured; None: where temporary files go."""
    members: int | None = None
    """Members of heads that are compared with the common way; None: as many as usual."""
    splits: int = 5
    """Splits on which heads are compared with the common way."""
    shrink: int = 1
    """Divides the channels of random features, for tests."""
    workers: int | None = None
    """Most simulated workers of a cluster; None: 64."""
    block_seconds: float = 1.0
    """For which a simulated block's passes are slept through."""
    blocks: int = 20
    """Simulated blocks for each worker."""
    seed: int = 0
    """Seed of noise, random maps and heads."""

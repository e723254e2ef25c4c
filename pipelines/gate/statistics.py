"""What few images can tell: bootstrap intervals, a paired test, and how many images would tell more.

n images; draws are seeded, so that the same values give the same figures.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

DRAWS = 2_000
"""Samples of the bootstrap."""
FLIPS = 10_000
"""Draws of the paired test, where not all flips are tried."""
_ALL_FLIPS_IMAGES = 12
_Z95 = 1.96


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over images with its interval."""

    mean: float
    ci95: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"mean": self.mean, "ci95": list(self.ci95)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference(Estimate):
    """A mean paired difference to the reference; above 0 is better."""

    p: float
    """Two-sided p-value of the sign-flip test."""
    spread: float
    """Standard deviation of the difference over images."""

    @property
    def above(self) -> bool:
        """Whether the interval lies above 0."""
        return self.ci95[0] > 0

    @property
    def below(self) -> bool:
        """Whether the interval lies below 0."""
        return self.ci95[1] < 0

    def images_needed(self, least: float) -> int:
        """Images with which the interval would either leave 0 or end below ``least``, if mean and spread stay so."""
        return math.ceil((_Z95 * self.spread / max(abs(self.mean), least)) ** 2)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"mean": self.mean, "ci95": list(self.ci95), "p": self.p}


def estimate(values: Float64Array, seed: int) -> Estimate:
    """Mean of n values and the 95 % percentile interval of the bootstrap over them (Efron, 1979)."""
    return Estimate(mean=float(values.mean()), ci95=interval(values, seed))


def interval(values: Float64Array, seed: int) -> tuple[float, float]:
    """2.5 % and 97.5 % percentiles of the means of `DRAWS` samples of n, drawn with replacement."""
    if np.ptp(values) == 0:  # or sums of equal numbers, rounded, would look like a spread
        return float(values[0]), float(values[0])
    rows = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.percentile(values[rows].mean(1), [2.5, 97.5])
    return float(low), float(high)


def difference(values: Float64Array, reference: Float64Array, seed: int) -> Difference:
    """How much n values exceed those of the reference, image by image."""
    paired = values - reference
    return Difference(
        mean=float(paired.mean()),
        ci95=interval(paired, seed),
        p=sign_flip_p(paired, seed),
        spread=float(paired.std(ddof=1)),
    )


def sign_flip_p(paired: Float64Array, seed: int) -> float:
    """Two-sided p-value of a mean of n paired differences, whose signs are as good as random if nothing differs.

    All 2^n flips are tried up to 12 images, `FLIPS` drawn ones beyond.
    """
    count = len(paired)
    if count <= _ALL_FLIPS_IMAGES:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
        means = np.abs(((1 - 2 * bits) * paired).mean(1))
        extra = 0
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (FLIPS, count))
        means = np.abs((signs * paired).mean(1))
        extra = 1  # the flip that was seen
    # Means that are equal but for the order of their sums count as equal.
    reached = int((means >= abs(paired.mean()) * (1 - 1e-9)).sum())
    return (reached + extra) / (len(means) + extra)

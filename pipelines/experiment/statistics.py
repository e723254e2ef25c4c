"""How sure a difference is: pairs of the same splits, and ranks over settings.

Splits are redraws from the same images, so an interval says what other redraws would give, not other images.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
_DRAWS = 9999


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Mean of ``a - b`` over pairs."""

    difference: float
    ci95: tuple[float, float] | None
    """By Student's t over the pairs; None for one pair."""
    p: float | None
    """Two-sided, by changing the signs of differences in all ways; None for one pair. With n pairs at least
    2 / 2**n."""
    pairs: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankCorrelation:
    """Spearman's coefficient."""

    rho: float | None
    """-1..1; None where it is not defined: all values of one side are equal."""
    p: float | None
    """Two-sided, by permuting one side."""
    settings: int


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compare values of the same splits.

    Args:
        a: of one setting, split by split.
        b: of the other, as many.
    """
    assert len(a) == len(b) >= 1, "settings that are compared have the same splits"
    differences = [one - other for one, other in zip(a, b, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return Difference(difference=mean, ci95=None, p=None, pairs=1)
    from scipy import stats

    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
    test = stats.permutation_test(
        (np.array(differences),),
        np.mean,
        permutation_type="samples",
        n_resamples=_DRAWS,
        rng=np.random.default_rng(0),
    )
    return Difference(difference=mean, ci95=(mean - half, mean + half), p=float(test.pvalue), pairs=len(differences))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> RankCorrelation:
    """Whether two figures of the same settings rise together.

    Args:
        x: one figure a setting.
        y: the other, as many.
    """
    assert len(x) == len(y), "two figures a setting"
    if len(set(x)) < 2 or len(set(y)) < 2:
        return RankCorrelation(rho=None, p=None, settings=len(x))
    from scipy import stats

    # ranked once: permuting does not change ranks, and of ranks Pearson's coefficient is Spearman's
    ranks = stats.rankdata(x), stats.rankdata(y)
    test = stats.permutation_test(
        (ranks[0],),
        lambda one: float(np.corrcoef(one, ranks[1])[0, 1]),
        permutation_type="pairings",
        n_resamples=_DRAWS,
        rng=np.random.default_rng(0),
        vectorized=False,
    )
    return RankCorrelation(rho=float(test.statistic), p=float(test.pvalue), settings=len(x))

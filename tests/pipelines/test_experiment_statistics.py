"""Intervals and p-values against numbers obtained another way."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from featstore.pipelines.experiment.statistics import paired, rank_correlation


def test_the_interval_is_students():
    found = paired([1, 2, 3, 4, 5], [0, 1, 2.5, 3, 4])
    assert found.difference == pytest.approx(0.9)
    assert found.pairs == 5
    # 2.776 is the table's 97.5 % point for 4 degrees of freedom
    half = 2.776 * statistics.stdev([1, 1, 0.5, 1, 1]) / math.sqrt(5)
    assert found.ci95 == pytest.approx((0.9 - half, 0.9 + half), abs=1e-4)


def test_p_counts_changes_of_sign():
    differences = np.array([0.3, -0.1, 0.25, 0.4, 0.05, 0.2])
    means = [abs(np.mean(differences * signs)) for signs in itertools.product((-1, 1), repeat=6)]
    share = np.mean(np.array(means) >= abs(differences.mean()) - 1e-12)
    assert paired(differences.tolist(), [0] * 6).p == pytest.approx(share)
    assert paired([1, 2, 3, 4, 5, 6], [0] * 6).p == pytest.approx(2 / 2**6)


def test_what_one_pair_and_no_difference_say():
    one = paired([2], [1.5])
    assert (one.difference, one.ci95, one.p, one.pairs) == (0.5, None, None, 1)
    same = paired([1, 2, 3], [1, 2, 3])
    assert (same.difference, same.ci95, same.p) == (0, (0, 0), 1)


def test_a_p_of_many_pairs_is_drawn_the_same_way_each_time():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 30)).tolist()
    found = paired(a, b)
    assert found == paired(a, b)
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.03)


def test_ranks_are_correlated_as_scipy_does_it():
    generator = np.random.default_rng(1)
    x = generator.normal(size=18)
    y = x + generator.normal(size=18)
    found = rank_correlation(x.tolist(), (10 * np.exp(y)).tolist())
    expected = stats.spearmanr(x, y)
    assert found.rho == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue, abs=0.02)
    assert found.settings == 18


def test_p_of_ranks_counts_orders():
    x, y = [1, 2, 3, 4, 5], [2.0, 1.0, 3.0, 5.0, 4.0]
    rho = stats.spearmanr(x, y).statistic
    all_of_them = [stats.spearmanr(x, order).statistic for order in itertools.permutations(y)]
    share = np.mean(np.abs(all_of_them) >= abs(rho) - 1e-12)
    found = rank_correlation(x, y)
    assert found.rho == pytest.approx(0.8)
    assert found.p == pytest.approx(share)


def test_equal_values_have_no_ranks():
    found = rank_correlation([1, 1, 1], [1, 2, 3])
    assert (found.rho, found.p, found.settings) == (None, None, 3)

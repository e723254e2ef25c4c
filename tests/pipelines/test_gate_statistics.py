"""Intervals and tests over images: against distributions that are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from featstore.pipelines.gate.statistics import difference, estimate, interval, sign_flip_p


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        low, high = interval(rng.normal(2.0, 1.0, 24), seed=trial)
        hits += low <= 2.0 <= high
    # 95 % less the percentile bootstrap's known optimism at few values; 300 trials scatter by 1.3 points.
    assert 0.88 <= hits / 300 <= 0.98


def test_the_interval_is_the_normal_one_for_many_values():
    values = np.random.default_rng(1).normal(5.0, 3.0, 4000)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    low, high = interval(values, seed=0)
    assert low == pytest.approx(values.mean() - half, abs=half / 8)
    assert high == pytest.approx(values.mean() + half, abs=half / 8)


def test_equal_values_have_no_spread_and_a_seed_gives_the_same_figures():
    assert interval(np.full(7, 0.1), seed=3) == (0.1, 0.1)
    values = np.random.default_rng(2).normal(size=9)
    assert estimate(values, 5) == estimate(values, 5)
    assert estimate(values, 5) != estimate(values, 6)
    assert estimate(values, 5).mean == pytest.approx(values.mean())


def test_all_flips_are_tried_with_few_images():
    values = np.array([0.4, -0.1, 0.7, 0.2, 0.9])
    means = [abs(np.mean(np.array(signs) * values)) for signs in itertools.product([1, -1], repeat=5)]
    expected = sum(mean >= abs(values.mean()) - 1e-12 for mean in means) / 32
    assert sign_flip_p(values, seed=0) == expected
    assert sign_flip_p(np.array([1.0, 2.0, 4.0, 8.0]), seed=0) == 2 / 16
    assert sign_flip_p(np.zeros(4), seed=0) == 1.0


def test_drawn_flips_are_uniform_without_an_effect_and_small_with_one():
    rng = np.random.default_rng(4)
    found = np.array([sign_flip_p(rng.normal(size=20), seed=trial) for trial in range(200)])
    assert 0.4 < found.mean() < 0.6
    assert (found < 0.05).mean() < 0.11
    assert sign_flip_p(rng.normal(3.0, 1.0, 20), seed=0) == pytest.approx(1 / 10_001)
    assert sign_flip_p(np.zeros(20), seed=0) == 1.0


def test_differences_are_paired():
    rng = np.random.default_rng(5)
    reference = rng.normal(0, 100, 16)  # far more spread between images than between techniques
    better = difference(reference + rng.normal(1.0, 0.5, 16), reference, seed=0)
    assert better.above
    assert not better.below
    assert better.p < 0.01
    worse = difference(reference, reference + 1.0, seed=0)
    assert worse.below
    assert worse.mean == pytest.approx(-1.0)
    same = difference(reference, reference, seed=0)
    assert (same.mean, same.ci95, same.p) == (0.0, (0.0, 0.0), 1.0)


def test_images_needed_shrink_the_interval_to_the_mean_or_to_nothing():
    paired = np.array([1.0, -1.0] * 50) + 0.25
    one = difference(paired, np.zeros(100), seed=0)
    assert one.images_needed(0.01) == int(np.ceil((1.96 * paired.std(ddof=1) / 0.25) ** 2))
    half = 1.96 * one.spread / np.sqrt(one.images_needed(0.5))
    assert half == pytest.approx(0.5, rel=0.05)

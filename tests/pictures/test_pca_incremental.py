"""A basis of maps that come one after the other, against the basis of all at once."""

from __future__ import annotations

import numpy as np
import pytest

from featstore.errors import BadRequestError
from featstore.pictures import BasisFit, fit_pca, pca_pictures, stack_layers
from featstore.pictures import pca_incremental as module


def parts(count=6, channels=24):
    rng = np.random.default_rng(0)
    scale = np.concatenate([[9, 6, 4], np.linspace(1.5, 0.5, channels - 3)])
    turn = np.linalg.qr(rng.normal(size=(channels, channels)))[0]
    mixed = (rng.normal(size=(count, 3, 20 * 20, channels)) * scale) @ turn + 5
    return [part.transpose(0, 2, 1).reshape(3, channels, 20, 20) for part in mixed]


def fitted(maps, **options):
    fit = BasisFit(parts=len(maps), **options)
    for part in maps:
        fit.add(part)
    return fit.basis()


def test_it_is_the_basis_of_all_at_once():
    maps = parts()
    basis, whole = fitted(maps), fit_pca(maps)
    overlap = np.abs(basis.components @ whole.components.T)
    np.testing.assert_allclose(overlap, np.eye(3), atol=0.02)
    np.testing.assert_allclose(basis.explained, whole.explained, rtol=0.02)
    np.testing.assert_allclose(basis.mean, whole.mean, atol=1e-6)
    # components may point the other way, which turns the range round
    signs = np.sign((basis.components * whole.components).sum(1))
    low, high = np.where(signs > 0, basis.low, -basis.high), np.where(signs > 0, basis.high, -basis.low)
    np.testing.assert_allclose(low, whole.low, rtol=0.1)
    np.testing.assert_allclose(high, whole.high, rtol=0.1)


def test_what_shows_only_later_is_found():
    rng = np.random.default_rng(1)
    early = rng.normal(size=(4, 8, 40, 40)) * np.array([3, 2, 1, 0.5, 0, 0, 0, 0])[:, None, None]
    late = rng.normal(size=(4, 8, 40, 40)) * np.array([0, 0, 0, 0, 0, 0, 0, 9])[:, None, None]
    assert abs(fitted([early, late]).components[0, 7]) > 0.99


def test_no_more_is_held_for_more_maps(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_PIXELS", 64)
    fit = BasisFit(parts=50, pixels=1000)
    for _ in range(10):
        for part in parts(count=5):
            fit.add(part)
            assert sum(map(len, fit._waiting)) < 2 * 64 + 1200
    assert sum(map(len, fit._kept)) <= 64 + 50
    assert len(fit.basis().components) == 3


def test_the_same_each_time_and_another_with_another_seed():
    one, again, other = fitted(parts(), pixels=500), fitted(parts(), pixels=500), fitted(parts(), pixels=500, seed=1)
    np.testing.assert_array_equal(one.components, again.components)
    assert not np.array_equal(one.components, other.components)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_few_channels_and_few_pixels(channels):
    maps = np.random.default_rng(0).normal(size=(1, channels, 2, 2))
    pictures = pca_pictures(fitted([maps]), maps)
    assert np.ptp(pictures[..., 0]) > 200
    assert (pictures[..., min(3, channels) :] == 0).all()


def test_constant_maps_do_not_fail():
    maps = np.full((2, 5, 50, 50), 7.0)
    assert len(np.unique(pca_pictures(fitted([maps, maps]), maps))) == 1
    basis = fitted([maps, maps, maps + np.arange(2)[:, None, None, None]])
    assert basis.explained[0] == pytest.approx(1)
    np.testing.assert_allclose(np.abs(basis.components[0]), 5**-0.5)


def test_sizes_are_the_same_for_all_stacks():
    maps = np.random.default_rng(0).normal(size=(2, 4, 3, 3))
    once, twice = (stack_layers({"a": factor * maps}, {"a": 2.0}) for factor in (1, 2))
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(BadRequestError, match="no maps"):
        BasisFit(parts=1).basis()
    fit = BasisFit(parts=2)
    fit.add(np.ones((1, 4, 2, 2)))
    with pytest.raises(BadRequestError, match="with C 4"):
        fit.add(np.ones((1, 5, 2, 2)))
    with pytest.raises(BadRequestError, match="not finite"):
        fit.add(np.full((1, 4, 2, 2), np.nan))

"""The projection of a layer's channels onto principal components."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from featstore.extraction.reduce import Moments, Projection, some_pixels

DIGEST = "ab" * 32


def vectors(seed, count=500, channels=12, offset=1000.0):
    """Correlated vectors far from zero, with variances that differ."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((channels, channels)) * np.arange(1, channels + 1)
    return (rng.standard_normal((count, channels)) @ mixing + offset).astype(np.float32)


def fitted(data, components, parts=1):
    moments = Moments(data.shape[1])
    for part in np.array_split(data, parts):
        moments.add(part)
    return moments.basis(components)


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize("components", [1, 3, 11])
def test_the_basis_is_that_of_scikit_learn(parts, components):
    data = vectors(0)
    basis = fitted(data, components, parts)
    theirs = PCA(components, svd_solver="covariance_eigh").fit(data.astype(np.float64))
    np.testing.assert_allclose(basis.mean, theirs.mean_, rtol=1e-6)
    largest = np.abs(basis.components).argmax(axis=1)
    assert (basis.components[np.arange(components), largest] > 0).all()
    signs = np.sign(theirs.components_[np.arange(components), largest])
    np.testing.assert_allclose(basis.components, theirs.components_ * signs[:, None], atol=1e-5)
    assert basis.explained == pytest.approx(theirs.explained_variance_ratio_.sum(), abs=1e-9)
    assert (basis.mean.dtype, basis.components.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(basis.components @ basis.components.T, np.eye(components), atol=1e-6)


def test_means_far_from_zero_cost_no_precision():
    near = np.round(vectors(4, offset=0.0))
    far = (near + 2.0**23).astype(np.float32)
    np.testing.assert_array_equal(far - np.float32(2.0**23), near)
    np.testing.assert_allclose(fitted(far, 4, 3).components, fitted(near, 4, 3).components, atol=1e-6)


def test_the_same_vectors_give_the_same_bytes():
    one, other = fitted(vectors(1), 4, 3), fitted(vectors(1), 4, 3)
    assert one.components.tobytes() == other.components.tobytes()
    assert one.mean.tobytes() == other.mean.tobytes()


def test_constant_layers_have_a_basis():
    basis = fitted(np.full((30, 5), 2.5, dtype=np.float32), 2)
    assert np.isfinite(basis.components).all()
    np.testing.assert_array_equal(basis.mean, np.full(5, 2.5, dtype=np.float32))
    assert basis.explained == 1.0


def test_a_fit_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no vectors"):
        Moments(3).basis(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projection_is_the_formula_and_rows_do_not_touch_each_other(dtype):
    basis = fitted(vectors(2), 5)
    maps = torch.from_numpy(vectors(3, 7 * 9 * 10).reshape(7, 9, 10, 12).transpose(0, 3, 1, 2)).to(dtype)
    project = Projection(basis, torch.device("cpu"))
    out = project(maps)
    assert (out.dtype, tuple(out.shape)) == (torch.float32, (7, 5, 9, 10))
    wide = maps.double().numpy() - basis.mean.astype(np.float64)[:, None, None]
    np.testing.assert_allclose(out, np.einsum("nc,bchw->bnhw", basis.components.astype(np.float64), wide), atol=5e-3)
    for rows in ([3], [6, 0], [2, 3, 4, 5], [1, 1, 1]):
        again = project(maps[rows].contiguous())
        assert again.numpy().tobytes() == out[rows].numpy().tobytes()


def test_places_of_a_map_depend_on_seed_image_and_layer_alone():
    maps = np.arange(3 * 8 * 8, dtype=np.float32).reshape(3, 8, 8)
    some = some_pixels(maps, DIGEST, "up1", 0, 10)
    assert some.shape == (10, 3)
    places = some[:, 0].astype(int)
    assert len(set(places)) == 10
    np.testing.assert_array_equal(some, maps.reshape(3, 64)[:, places].T)
    np.testing.assert_array_equal(some, some_pixels(maps, DIGEST, "up1", 0, 10))
    for other in ((maps, "cd" * 32, "up1", 0), (maps, DIGEST, "up2", 0), (maps, DIGEST, "up1", 1)):
        assert not np.array_equal(some, some_pixels(*other, 10))
    np.testing.assert_array_equal(some_pixels(maps, DIGEST, "up1", 0, 64), maps.reshape(3, 64).T)

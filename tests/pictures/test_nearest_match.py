"""Nearest matches, against upsampling everything and looking at every pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from featstore.errors import BadRequestError
from featstore.pictures import nearest
from featstore.pictures.nearest_match import vector_at


def upsampled(maps, size):
    wide = torch.from_numpy(maps.astype(np.float64))[None]
    return interpolate(wide, size, mode="bilinear", align_corners=False)[0].numpy()


def brute_force(source, point, source_size, target, target_size):
    vector = upsampled(source, source_size)[:, point[0], point[1]]
    others = upsampled(target, target_size)
    heat = np.zeros(target_size)
    for y in range(target_size[0]):
        for x in range(target_size[1]):
            heat[y, x] = vector @ others[:, y, x] / np.linalg.norm(vector) / np.linalg.norm(others[:, y, x])
    return heat


sides = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(sides, sides),
    st.tuples(sides, sides),
    st.tuples(sides, sides),
    st.tuples(sides, sides),
    st.integers(0, 99),
)
def test_it_is_what_upsampling_and_looking_everywhere_gives(cells, size, other_cells, other_size, seed):
    rng = np.random.default_rng(seed)
    source = rng.normal(size=(5, *cells)).astype(np.float32)
    target = rng.normal(size=(5, *other_cells)).astype(np.float32)
    point = (int(rng.integers(size[0])), int(rng.integers(size[1])))
    match = nearest(source, point, size, target, other_size)
    heat = brute_force(source, point, size, target, other_size)
    np.testing.assert_allclose(match.heat, heat, atol=1e-6)
    assert heat[match.y, match.x] == pytest.approx(heat.max(), abs=1e-6)
    assert match.cosine == match.heat[match.y, match.x] == match.heat.max()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_was_moved_is_found_where_it_is(dtype):
    rng = np.random.default_rng(0)
    source = rng.normal(size=(32, 8, 8)).astype(dtype)
    target = np.roll(source, (2, 3), axis=(1, 2))
    # the middle of cell (3, 1): pixel centres of an image of 40 px, five a cell
    match = nearest(source, (17, 7), (40, 40), target, (40, 40))
    assert (match.y, match.x) == (27, 22)
    assert match.cosine == pytest.approx(1, abs=1e-9)


def test_images_of_other_sizes_have_pixels_of_their_own():
    rng = np.random.default_rng(1)
    source = rng.normal(size=(16, 4, 6))
    match = nearest(source, (5, 9), (12, 18), source[:, ::-1], (120, 60))
    assert match.heat.shape == (120, 60)
    assert 60 <= match.y < 90
    assert 30 <= match.x < 40


def test_a_feature_that_is_zero_matches_nothing():
    target = np.zeros((3, 4, 4))
    target[:, 0, 0] = 1
    match = nearest(np.ones((3, 2, 2)), (0, 0), (8, 8), target, (8, 8))
    assert match.cosine == pytest.approx(1)
    assert match.heat[7, 7] == 0
    assert (nearest(np.zeros((3, 2, 2)), (0, 0), (8, 8), target, (8, 8)).heat == 0).all()


def test_what_cannot_be_matched_is_refused():
    maps = np.ones((3, 4, 4))
    with pytest.raises(BadRequestError, match="same channels"):
        nearest(maps, (0, 0), (8, 8), np.ones((4, 4, 4)), (8, 8))
    for point in ((8, 0), (0, 8), (-1, 0)):
        with pytest.raises(BadRequestError, match="outside the image of 8 x 8 px"):
            vector_at(maps, *point, (8, 8))
    broken = maps.copy()
    broken[0, 0, 0] = np.nan
    with pytest.raises(BadRequestError, match="not finite"):
        nearest(maps, (0, 0), (8, 8), broken, (8, 8))

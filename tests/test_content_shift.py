"""The score of content shift: against cases worked by hand, and against torch's convolution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from featstore.content_shift import laplacian_norm, score, shift, shift_map, telling_layers
from featstore.errors import BadRequestError

KERNEL = [[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]


def maps(seed=0, shape=(3, 5, 12, 10)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def blurred(values, radius):
    """Each channel of maps (B, C, H, W) through a Gaussian of this many pixels, by torch."""
    x = torch.arange(-6, 7, dtype=torch.float64)
    window = torch.exp(-(x**2) / (2 * radius**2))
    window = torch.outer(window, window) / window.sum() ** 2
    flat = torch.from_numpy(values).double().flatten(0, 1)[:, None]
    padded = torch.nn.functional.pad(flat, (6, 6, 6, 6), mode="reflect")
    return torch.nn.functional.conv2d(padded, window[None, None])[:, 0].reshape(values.shape).numpy()


def test_a_case_worked_by_hand():
    one = np.zeros((1, 2, 3, 4))
    one[0, 0] = [[0, 1, 0, 0], [2, 5, 3, 0], [0, 4, 0, 0]]
    one[0, 1] = [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 2]]
    # Channel 0: 1 + 4 + 2 + 3 - 20 = -10, 0 + 0 + 5 + 0 - 12 = -7; channel 1: 0, 1 + 0 + 0 + 0 - 0 = 1.
    assert laplacian_norm(one) == pytest.approx(np.array([[[10.0, np.sqrt(50)]]]))
    none = np.zeros_like(one)
    assert shift_map(none, one) == pytest.approx(np.array([[[10.0, np.sqrt(50)]]]))
    assert shift(none, one) == pytest.approx([10 + np.sqrt(50)])
    assert score(shift(one, none), 2 * shift(one, none)) == pytest.approx([0.5])


def test_it_is_torchs_convolution_over_valid_positions():
    values = maps()
    kernel = torch.tensor(KERNEL, dtype=torch.float64)[None, None].expand(5, 1, 3, 3)
    expected = torch.nn.functional.conv2d(torch.from_numpy(values).double(), kernel, groups=5).norm(dim=1)
    assert expected.shape == (3, 10, 8)
    assert np.abs(laplacian_norm(values) - expected.numpy()).max() < 1e-12


def test_identical_features_score_one_and_the_anchor_zero():
    reference, anchor = maps(0), maps(1)
    away = shift(reference, anchor)
    assert (score(shift(reference, reference), away) == 1.0).all()
    assert (score(away, away) == 0.0).all()
    farther = shift(reference, 10 * anchor)
    assert (score(farther, away) < 0).all()


def test_it_falls_with_blur():
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (4, 6, 6), dtype=np.uint8)
    sharp = np.stack([[np.asarray(Image.fromarray(one).resize((32, 32)), np.float64)] for one in coarse])
    sharp = sharp + rng.standard_normal(sharp.shape)
    away = shift(sharp, np.zeros_like(sharp))
    scores = [score(shift(sharp, blurred(sharp, radius)), away) for radius in (0.3, 0.6, 1.0, 2.0)]
    assert (scores[0] < 1).all()
    for less, more in itertools.pairwise(scores):
        assert (more < less).all()


def test_the_order_of_channels_does_not_matter():
    reference, anchor, values = maps(0), maps(1), maps(2)
    order = [3, 0, 4, 2, 1]
    before = score(shift(reference, values), shift(reference, anchor))
    after = score(shift(reference, values[:, order]), shift(reference, anchor[:, order]))
    assert np.abs(before - after).max() < 1e-12
    all_permuted = score(shift(reference[:, order], values[:, order]), shift(reference[:, order], anchor[:, order]))
    assert np.abs(before - all_permuted).max() < 1e-12


def test_a_pattern_does_not_depend_on_how_large_activations_are():
    reference, values = maps(0), maps(1)
    assert shift(reference, 4 * reference, pattern=True) == pytest.approx(np.zeros(3), abs=1e-9)
    assert (shift(reference, 4 * reference) > 1).all()
    scale = np.array([0.5, 2.0, 32.0], np.float32)[:, None, None, None]
    assert shift(reference, scale * values, pattern=True) == pytest.approx(shift(reference, values, pattern=True))
    norms = [laplacian_norm(one) for one in (reference, values)]
    by_hand = [abs(one / one.mean() - other / other.mean()).sum() for one, other in zip(*norms, strict=True)]
    assert shift(reference, values, pattern=True) == pytest.approx(by_hand)
    assert not shift_map(0 * reference, 0 * reference, pattern=True).any()


def test_the_pattern_falls_with_blur_and_not_with_the_order_of_channels():
    reference, anchor = maps(0, (3, 5, 24, 24)), maps(1, (3, 5, 24, 24))
    away = shift(reference, anchor, pattern=True)
    scores = [score(shift(reference, blurred(reference, r), pattern=True), away) for r in (0.01, 0.5, 1.0)]
    assert scores[0] == pytest.approx(np.ones(3))
    for less, more in itertools.pairwise(scores):
        assert (more < less).all()
    order = [3, 0, 4, 2, 1]
    permuted = shift(reference, anchor[:, order], pattern=True)
    assert permuted == pytest.approx(away)


def test_small_maps_are_judged_only_where_there_are_no_larger_ones():
    shapes = {"a": (9, 4, 4), "b": (9, 8, 12), "c": (9, 16, 16), "d": (9, 2, 20)}
    assert telling_layers(shapes) == ["b", "c"]
    assert telling_layers({name: shapes[name] for name in "ad"}) == ["a"]
    assert telling_layers({"d": shapes["d"]}) == telling_layers({}) == []


def test_an_anchor_without_shift_is_an_error_that_says_what_to_do():
    with pytest.raises(BadRequestError, match="no content shift in 1 of 2 images") as caught:
        score(np.array([1.0, 1.0]), np.array([2.0, 0.0]))
    assert "501" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: laplacian_norm(maps()[0]), r"not \(5, 12, 10\)"),
        (lambda: laplacian_norm(maps(shape=(1, 2, 2, 5))), r"not \(1, 2, 2, 5\)"),
        (lambda: laplacian_norm(np.where(np.arange(10) == 4, np.nan, maps())), "NaN"),
        (lambda: shift(maps(), maps(shape=(3, 5, 12, 11))), "another shape"),
        (lambda: score(np.ones(2), np.ones(3)), r"\(2,\) features"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, words):
    with pytest.raises(BadRequestError, match=words):
        call()

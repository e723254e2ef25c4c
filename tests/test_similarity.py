"""Similarities of pictures: each against another computation of the same."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from featstore.errors import BadRequestError
from featstore.similarity import MAX_PSNR_DB, edge_f1, psnr_db, relative_distance, ssim


def pictures(seed=0, count=3, side=48):
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in coarse])


def spoiled(images, amount, seed=1):
    noise = np.random.default_rng(seed).normal(0, amount, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def test_ssim_is_scikit_images():
    a, b = pictures(), spoiled(pictures(), 20)
    found = ssim(a, b)
    assert found.shape == (3,)
    for one, other, value in zip(a, b, found, strict=True):
        # scikit-image leaves a border of 5 px out, which torchmetrics continues by reflection.
        wide, wide_other = (np.pad(image, ((5, 5), (5, 5), (0, 0)), mode="reflect") / 255 for image in (one, other))
        expected = structural_similarity(
            wide, wide_other, data_range=1.0, channel_axis=2, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert value == pytest.approx(expected, abs=1e-4)


def test_psnr_is_its_formula_image_by_image():
    a, b = pictures(), spoiled(pictures(), 20)
    mse = ((a.astype(float) - b) ** 2).mean((1, 2, 3))
    assert psnr_db(a, b) == pytest.approx(10 * np.log10(255**2 / mse), abs=1e-3)


@pytest.mark.parametrize("measure", [ssim, psnr_db, edge_f1])
def test_more_noise_is_less_similar_and_images_do_not_touch_each_other(measure):
    a = pictures()
    scores = [measure(a, spoiled(a, amount)) for amount in (0, 15, 60)]
    assert (scores[0] > scores[1]).all()
    assert (scores[1] > scores[2]).all()
    assert measure(a[1:2], spoiled(a, 15)[1:2]) == pytest.approx(scores[1][1:2])


def test_equal_pictures_get_the_most():
    a = pictures()
    assert ssim(a, a) == pytest.approx(np.ones(3))
    assert (psnr_db(a, a) == MAX_PSNR_DB).all()
    assert 10 * np.log10(255**2 * 12) == pytest.approx(MAX_PSNR_DB, abs=0.01)
    assert (edge_f1(a, a) == 1).all()
    assert (relative_distance(a, a) == 0).all()


def test_edges_one_pixel_beside_count_and_two_do_not():
    def line(column):
        image = np.zeros((1, 32, 32, 3), np.uint8)
        image[:, :, column:] = 255
        assert cv2.Canny(image[0], 100, 200).any()
        return image

    assert edge_f1(line(16), line(16)) == pytest.approx([1.0])
    assert edge_f1(line(16), line(17)) == pytest.approx([1.0])
    assert edge_f1(line(16), line(20)) == pytest.approx([0.0])
    # Both lines found, one of them wanted: precision 1/2, recall 1.
    both = line(10)
    both[:, :, 20:] = 0
    assert edge_f1(line(10), both) == pytest.approx([2 / 3], abs=0.02)


def test_pictures_without_edges_agree_with_each_other_only():
    flat, edged = np.full((1, 16, 16, 3), 9, np.uint8), np.zeros((1, 16, 16, 3), np.uint8)
    edged[:, 8:] = 255
    assert edge_f1(flat, flat).tolist() == [1.0]
    assert edge_f1(flat, edged).tolist() == [0.0]
    assert edge_f1(edged, flat).tolist() == [0.0]


def test_relative_distance_by_hand():
    reference = np.array([[[3.0, 4.0]], [[0.0, 2.0]]])
    assert relative_distance(reference, np.array([[[3.0, 9.0]], [[0.0, 2.0]]])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ssim(pictures(), pictures(side=32)), "another shape"),
        (lambda: ssim(pictures(side=8), pictures(side=8)), "11 px"),
        (lambda: psnr_db(pictures().astype(np.float32), pictures()), "float32"),
        (lambda: edge_f1(pictures()[0], pictures()[0]), r"uint8 \(B, H, W, 3\)"),
        (lambda: relative_distance(np.ones((1, 2)), np.ones((1, 3))), "another shape"),
        (lambda: relative_distance(np.zeros((1, 2)), np.ones((1, 2))), "length zero"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, words):
    with pytest.raises(BadRequestError, match=words):
        call()

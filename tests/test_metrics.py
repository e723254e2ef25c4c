import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score

from featstore.errors import BadRequestError
from featstore.metrics import SegmentationMeter, small_area_mask, small_area_min_px


@pytest.mark.parametrize(
    ("height", "width", "pixels"),
    [(256, 256, 20), (64, 64, 2), (512, 256, 40), (128, 128, 5), (8, 8, 1), (257, 256, 21)],
)
def test_the_small_area_rule_scales_with_the_area_and_rounds_up(height, width, pixels):
    assert small_area_min_px(height, width) == pixels


def test_classes_with_too_few_pixels_are_ignored_and_others_stay():
    mask = np.zeros((64, 64), np.uint8)
    mask[0, 0] = 3  # one pixel: below the 2 that 64 x 64 asks for
    mask[1, :2] = 4
    mask[2, :5] = 255
    before = mask.copy()
    out = small_area_mask(mask)
    expected = before.copy()
    expected[0, 0] = 255
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(mask, before)


def test_a_given_minimum_and_ignored_label_are_used():
    mask = np.array([[0, 0, 0], [1, 1, 9], [2, 9, 9]], np.uint8)
    np.testing.assert_array_equal(
        small_area_mask(mask, 3, ignore_label=9), np.array([[0, 0, 0], [9, 9, 9], [9, 9, 9]], np.uint8)
    )


@pytest.mark.parametrize("mask", [np.zeros((2, 3, 3), np.uint8), np.zeros((3, 3), np.int64)])
def test_what_is_no_label_map_is_refused(mask):
    with pytest.raises(BadRequestError, match="uint8"):
        small_area_mask(mask)


def test_a_case_worked_by_hand():
    truth = np.array([[0, 0, 1], [0, 1, 1], [2, 2, 255]], np.uint8)
    predicted = np.array([[0, 1, 1], [0, 1, 0], [2, 1, 2]], np.uint8)
    meter = SegmentationMeter(("a", "b", "c", "d"))
    meter.update(predicted, truth)
    scores = meter.compute()
    # a: right at 2 pixels; 3 in the truth, 3 predicted, so a union of 4
    # b: right at 2; 3 in the truth, 4 predicted, union 5
    # c: right at 1; 2 in the truth, 1 predicted (the other one is where the truth is ignored), union 2
    # d: nowhere, so it has no value and does not enter the mean
    assert scores.iou == pytest.approx((2 / 4, 2 / 5, 1 / 2, None))
    assert scores.miou == pytest.approx((2 / 4 + 2 / 5 + 1 / 2) / 3)
    assert scores.accuracy == pytest.approx(5 / 8)
    # right of each class's own pixels: a 2 of 3, b 2 of 3, c 1 of 2; d has none in the truth
    assert scores.macc == pytest.approx((2 / 3 + 2 / 3 + 1 / 2) / 3)
    assert scores.pixels == (3, 3, 2, 0)
    assert scores.to_json()["per_class"][3] == {"class": "d", "iou": None, "pixels": 0}


def test_a_class_that_is_only_predicted_counts_as_zero():
    meter = SegmentationMeter(("a", "b"))
    meter.update(np.array([[0, 1]], np.uint8), np.array([[0, 0]], np.uint8))
    assert meter.compute().iou == (0.5, 0.0)
    assert meter.compute().miou == 0.25
    assert meter.compute().macc == 0.5  # of the one class that is in the truth


def test_scores_over_several_images_equal_those_of_sklearn_over_all_pixels():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 5, (4, 9, 7)).astype(np.uint8)
    predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, 5, truth.shape)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.2] = 255
    meter = SegmentationMeter([f"class {i}" for i in range(5)])
    for one, other in zip(predicted, truth, strict=True):
        meter.update(one, other)
    named = truth != 255
    scores = meter.compute()
    np.testing.assert_array_equal(meter.confusion, confusion_matrix(truth[named], predicted[named]))
    np.testing.assert_allclose(scores.iou, jaccard_score(truth[named], predicted[named], average=None), rtol=1e-6)
    assert scores.miou == pytest.approx(jaccard_score(truth[named], predicted[named], average="macro"))
    assert scores.accuracy == pytest.approx(accuracy_score(truth[named], predicted[named]))
    assert scores.macc == pytest.approx(balanced_accuracy_score(truth[named], predicted[named]))


def test_without_labelled_pixels_there_is_no_score():
    meter = SegmentationMeter(("a", "b"))
    assert math.isnan(meter.compute().miou)
    meter.update(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8))
    scores = meter.compute()
    assert math.isnan(scores.miou)
    assert math.isnan(scores.accuracy)
    assert math.isnan(scores.macc)
    assert scores.iou == (None, None)


def test_label_maps_of_different_shapes_are_refused():
    with pytest.raises(BadRequestError, match="differ in shape"):
        SegmentationMeter(("a", "b")).update(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8))


def test_one_class_is_no_segmentation():
    with pytest.raises(BadRequestError, match="at least 2 classes"):
        SegmentationMeter(("a",))


def test_a_class_that_nobody_could_learn_has_no_score():
    truth = np.array([[0, 0, 1], [0, 1, 1], [2, 2, 2]], np.uint8)
    predicted = np.array([[0, 0, 1], [0, 1, 1], [0, 1, 1]], np.uint8)
    meter = SegmentationMeter(("a", "b", "c"), absent=("c",))
    meter.update(predicted, truth)
    scores = meter.compute()
    # the pixels of c count as errors of those that took them: a 3 of 4, b 3 of 5
    assert scores.iou == pytest.approx((3 / 4, 3 / 5, None))
    assert scores.miou == pytest.approx((3 / 4 + 3 / 5) / 2)
    assert scores.macc == 1
    assert scores.accuracy == pytest.approx(6 / 9)
    assert scores.pixels == (3, 3, 3)

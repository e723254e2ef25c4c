import json

import numpy as np
import pytest

from featstore.errors import BadRequestError
from featstore.metrics_classification import classification_scores, risk_coverage_area

CLASSES = ("a", "b", "c")
PROBABILITIES = np.array(
    [[0.9, 0.1, 0], [0.3, 0.6, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.4, 0.35, 0.25]], np.float32
)
TRUTH = np.array([0, 0, 1, 1, 0])
"""Predicted: a b b a a, so right, wrong, right, wrong, right."""


def test_a_case_worked_by_hand():
    scores = classification_scores(PROBABILITIES, TRUTH, CLASSES)
    assert scores.accuracy == pytest.approx(3 / 5)
    assert scores.images == (3, 2, 0)
    assert scores.class_accuracy == pytest.approx((2 / 3, 1 / 2, None))
    assert scores.mean_class_accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    # scores for a: 0.9 0.3 0.4 where it is so, 0.2 0.5 where not: 4 of the 6 pairs are in order
    # scores for b: 0.7 0.4 where it is so, 0.1 0.6 0.35 where not: 5 of the 6
    assert scores.class_auroc == pytest.approx((4 / 6, 5 / 6, None))
    assert scores.auroc == pytest.approx((4 / 6 + 5 / 6) / 2)
    # ranks of a's own among all by their score: 1st, 3rd and 4th; of b's: 1st and 3rd
    precision = ((1 / 1 + 2 / 3 + 3 / 4) / 3, (1 / 1 + 2 / 3) / 2)
    assert scores.class_average_precision == pytest.approx((*precision, None))
    assert scores.average_precision == pytest.approx(sum(precision) / 2)
    # each confidence has a bin of fifteenths of its own
    assert scores.calibration_error == pytest.approx((0.1 + 0.6 + 0.3 + 0.5 + 0.6) / 5)
    # by confidence: 0.9 right, 0.7 right, 0.6 wrong, 0.5 wrong, 0.4 right
    assert scores.aurc == pytest.approx((0 + 0 + 1 / 3 + 2 / 4 + 2 / 5) / 5)


def test_confidences_of_one_bin_are_taken_together():
    # 0.80 to 0.86 is the 13th of 15 bins: three images, two right, mean confidence 0.83
    probabilities = np.array([[0.82, 0.18], [0.83, 0.17], [0.84, 0.16]], np.float32)
    scores = classification_scores(probabilities, np.array([0, 0, 1]), ("a", "b"))
    assert scores.calibration_error == pytest.approx(abs(0.83 - 2 / 3), abs=1e-6)


def test_the_json_is_plain_and_complete():
    value = classification_scores(PROBABILITIES, TRUTH, CLASSES).to_json()
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert set(value) == {
        *("accuracy", "mean_class_accuracy", "auroc", "average_precision", "calibration_error", "aurc", "per_class")
    }
    assert value["per_class"][2] == {
        "class": "c",
        "images": 0,
        "accuracy": None,
        "auroc": None,
        "average_precision": None,
    }


def test_a_truth_of_one_class_has_no_ranking():
    scores = classification_scores(PROBABILITIES, np.zeros(5, np.int64), CLASSES)
    assert scores.class_auroc == (None, None, None)
    assert scores.auroc is None
    assert scores.class_average_precision == pytest.approx((1.0, None, None))


def test_perfect_and_perfectly_wrong():
    sure = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]]
    right = classification_scores(sure, np.array([0, 1, 2, 1]), CLASSES)
    assert (right.accuracy, right.auroc, right.average_precision, right.aurc) == (1, 1, 1, 0)
    assert right.calibration_error == 0
    wrong = classification_scores(sure, np.array([1, 2, 0, 2]), CLASSES)
    assert (wrong.accuracy, wrong.aurc, wrong.calibration_error) == (0, 1, 1)


def test_means_agree_with_torchmetrics_own_multiclass_forms():
    from torch import from_numpy
    from torchmetrics.functional import classification as scores

    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, 200)
    logits = rng.standard_normal((200, 5)) + 1.5 * np.eye(5)[truth]
    said = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    ours = classification_scores(said, truth, "abcde")
    given = from_numpy(said), from_numpy(truth)
    assert ours.accuracy == pytest.approx(float(scores.multiclass_accuracy(*given, 5, average="micro")))
    assert ours.mean_class_accuracy == pytest.approx(float(scores.multiclass_accuracy(*given, 5, average="macro")))
    assert ours.auroc == pytest.approx(float(scores.multiclass_auroc(*given, 5)), abs=1e-6)
    assert ours.average_precision == pytest.approx(float(scores.multiclass_average_precision(*given, 5)), abs=1e-6)


def test_equal_confidences_count_the_same_in_any_order():
    confidence = np.array([0.9, 0.5, 0.5, 0.5, 0.2], np.float32)
    wrong = np.array([False, True, False, False, True])
    orders = [np.random.default_rng(k).permutation(5) for k in range(6)]
    areas = [risk_coverage_area(confidence[order], wrong[order]) for order in orders]
    np.testing.assert_allclose(areas, (0 + (1 / 3) / 2 + (2 / 3) / 3 + 1 / 4 + 2 / 5) / 5)


def test_no_image_has_no_score():
    value = classification_scores(np.empty((0, 3), np.float32), np.empty(0, np.int64), CLASSES).to_json()
    assert {value[name] for name in value if name != "per_class"} == {None}


@pytest.mark.parametrize(
    ("probabilities", "truth", "classes", "message"),
    [
        (PROBABILITIES[:, :1], TRUTH, ("a",), "at least 2 classes"),
        (PROBABILITIES[:4], TRUTH, CLASSES, "5 images of 3 classes, but probabilities"),
        (PROBABILITIES, TRUTH + 2, CLASSES, "labels 2..3 are not within 0..2"),
        (PROBABILITIES, TRUTH - 1, CLASSES, "labels -1..0"),
    ],
)
def test_what_does_not_fit_together_is_refused(probabilities, truth, classes, message):
    with pytest.raises(BadRequestError, match=message):
        classification_scores(probabilities, truth, classes)

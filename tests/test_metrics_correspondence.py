import math

import numpy as np
import pytest

from featstore.errors import BadRequestError
from featstore.metrics_correspondence import CorrespondenceMeter


def points(*xy):
    return np.array(xy, np.float32)


@pytest.fixture
def meter():
    """Two pairs: a target of 200 x 100 px with a box of 40 x 50, and one of 80 x 90 px with a box of 80 x 20."""
    meter = CorrespondenceMeter()
    # by the image: 20 px allowed; by the box: 5 px. Off by 0, 5 (3-4-5), 6 and 21 px.
    meter.update(
        points((10, 10), (13, 14), (16, 10), (31, 10)),
        points((10, 10), (10, 10), (10, 10), (10, 10)),
        size_px=(100, 200),
        box_px=(0, 10, 40, 60),
        category="horse",
    )
    # by the image: 9 px; by the box: 8 px. Off by 8 and 9 px.
    meter.update(
        points((0, 8), (9, 0)), points((0, 0), (0, 0)), size_px=(80, 90), box_px=(5, 5, 85, 25), category="cat"
    )
    return meter


def test_a_case_worked_by_hand(meter):
    scores = meter.compute()
    assert scores.pck_img == pytest.approx((3 / 4 + 2 / 2) / 2)
    assert scores.pck_bbox == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert scores.pck_img_point == pytest.approx(5 / 6)
    assert scores.pck_bbox_point == pytest.approx(3 / 6)
    # 1 - d / allowed: 1, 0, 0, 0 and 0, 0
    assert scores.pck_bbox_auc == pytest.approx((1 / 4 + 0) / 2)
    assert (scores.pairs, scores.points) == (2, 6)


def test_categories_are_scored_apart(meter):
    scores = meter.by_category()
    assert list(scores) == ["cat", "horse"]
    assert (scores["horse"].pck_img, scores["horse"].pck_bbox, scores["horse"].points) == (0.75, 0.5, 4)
    assert (scores["cat"].pck_img, scores["cat"].pck_bbox, scores["cat"].pairs) == (1.0, 0.5, 1)


def test_the_area_is_that_under_the_curve_over_alpha():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(0, 8, (rng.integers(1, 6), 2)), 50 + 10 * number) for number in range(7)]

    def score(alpha):
        meter = CorrespondenceMeter(alpha=alpha)
        for found, side in pairs:
            meter.update(found, np.zeros_like(found), size_px=(500, 500), box_px=(0, 0, side, side / 2))
        return meter.compute()

    alphas = np.linspace(0, 0.3, 3001)[1:]
    curve = [score(alpha).pck_bbox for alpha in alphas]
    assert 0.3 < curve[-1] < 1
    assert score(0.3).pck_bbox_auc == pytest.approx(np.mean(curve), abs=1e-3)


def test_another_alpha_is_used():
    meter = CorrespondenceMeter(alpha=0.5)
    meter.update(points((0, 40)), points((0, 0)), size_px=(100, 60), box_px=(0, 0, 70, 70))
    assert (meter.compute().pck_img, meter.compute().pck_bbox) == (1.0, 0.0)


def test_without_a_pair_there_is_no_score():
    scores = CorrespondenceMeter().compute()
    assert math.isnan(scores.pck_img)
    assert scores.to_json() == {
        "pck_img": None,
        "pck_bbox": None,
        "pck_img_point": None,
        "pck_bbox_point": None,
        "pck_bbox_auc": None,
        "pairs": 0,
        "points": 0,
    }
    assert CorrespondenceMeter().by_category() == {}


@pytest.mark.parametrize(
    ("found", "true", "box"),
    [
        (points((0, 0)), points((0, 0), (1, 1)), (0, 0, 9, 9)),
        (np.zeros((0, 2)), np.zeros((0, 2)), (0, 0, 9, 9)),
        (np.zeros((2, 3)), np.zeros((2, 3)), (0, 0, 9, 9)),
        (points((0, 0)), points((0, 0)), (4, 4, 4, 4)),
    ],
)
def test_what_cannot_be_measured_is_refused(found, true, box):
    with pytest.raises(BadRequestError):
        CorrespondenceMeter().update(found, true, size_px=(10, 10), box_px=box)


def test_alpha_is_positive():
    with pytest.raises(BadRequestError, match="alpha 0"):
        CorrespondenceMeter(alpha=0)

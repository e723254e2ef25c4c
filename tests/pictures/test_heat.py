from __future__ import annotations

import numpy as np
import pytest

from featstore.errors import BadRequestError
from featstore.pictures import heat_picture


def test_brighter_is_higher_on_a_scale_that_is_shared():
    values = np.array([[0.0, 1.0], [2.0, 4.0]])
    brightness = heat_picture(values, low=0, high=4).astype(int).sum(-1)
    assert (np.diff(brightness.ravel()) > 0).all()
    np.testing.assert_array_equal(
        heat_picture(values, low=0, high=8)[1, 1], heat_picture(values / 2, low=0, high=4)[1, 1]
    )
    assert heat_picture(values, low=0, high=4, size=(6, 4)).shape == (6, 4, 3)
    assert len(np.unique(heat_picture(np.ones((2, 2)), low=1, high=1).reshape(-1, 3), axis=0)) == 1


def test_the_image_shows_through():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2] = 255
    picture = heat_picture(np.zeros((2, 2)), low=0, high=1, size=(4, 4), image=image)
    assert picture[:2].mean() > picture[2:].mean() + 50


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(BadRequestError, match="finite"):
        heat_picture(np.full((2, 2), np.inf), low=0, high=1)
    with pytest.raises(BadRequestError, match="finite"):
        heat_picture(np.zeros(4), low=0, high=1)
    with pytest.raises(BadRequestError, match="show through"):
        heat_picture(np.zeros((2, 2)), low=0, high=1, image=np.zeros((3, 3, 3), np.uint8))

import numpy as np
import pytest
from PIL import Image

from featstore.errors import BadRequestError
from featstore.pictures import class_colours, save_assigners


def test_bars_are_as_long_as_the_weights(tmp_path):
    path = save_assigners(tmp_path / "p" / "a.png", {"layer": [[0.25, 0.75], [1.0, 0.0]]}, ["basic", "prompt"])
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    first, second = (
        (pixels == colour).all(2).sum(1).reshape(-1) for colour in class_colours(3)[1:]
    )  # pixels of each run's colour, by line of the picture
    both = np.flatnonzero((first > 50) & (second > 50))
    alone = np.flatnonzero((first > 50) & (second == 0))
    assert len(both)
    assert np.median(first[both] / (first[both] + second[both])) == pytest.approx(0.25, abs=0.02)
    assert np.median(first[alone]) == pytest.approx(np.median(first[both] + second[both]), rel=0.02)


@pytest.mark.parametrize("weights", [{}, {"layer": []}, {"layer": [[1.0]]}])
def test_weights_of_other_runs_are_refused(tmp_path, weights):
    with pytest.raises(BadRequestError, match="2 runs"):
        save_assigners(tmp_path / "a.png", weights, ["basic", "prompt"])

"""PNG or SVG, by the name's ending."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from featstore.errors import BadRequestError
from featstore.pictures import Panel, save_assigners, save_grid

PANELS = [Panel(title="a $x$ & <b>", pictures=(np.full((8, 8, 3), (250, 20, 30), np.uint8),))]


def test_svg_is_drawn_by_its_name_and_is_the_same_each_time(tmp_path: Path) -> None:
    first = save_grid(tmp_path / "one.svg", PANELS, title="T")
    again = save_grid(tmp_path / "two.SVG", PANELS, title="T")
    assert first.read_bytes() == again.read_bytes()
    root = ElementTree.parse(first).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    images = root.findall(".//{http://www.w3.org/2000/svg}image")
    assert [image.get("{http://www.w3.org/1999/xlink}href")[:10] for image in images] == ["data:image"]
    assert b"http://matplotlib" not in first.read_bytes()
    bars = save_assigners(tmp_path / "bars.svg", {"layer": [[0.25, 0.75]]}, ["basic", "prompt"])
    assert ElementTree.parse(bars).getroot().tag.endswith("svg")


def test_png_is_still_png(tmp_path: Path) -> None:
    with Image.open(save_grid(tmp_path / "one.PNG", PANELS)) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.html"])
def test_other_endings_are_refused_with_a_name_that_works(tmp_path: Path, name: str) -> None:
    for draw in (lambda path: save_grid(path, PANELS), lambda path: save_assigners(path, {"l": [[1.0]]}, ["basic"])):
        with pytest.raises(BadRequestError, match=r"neither in \.png nor in \.svg") as caught:
            draw(tmp_path / name)
        assert caught.value.hint == "name it a.png"
    assert list(tmp_path.iterdir()) == []

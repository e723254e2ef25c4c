"""SPair-71k, from a tiny tree in its own layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featstore.datasets import DATASETS, Pair, UnreadableImageError, resolve
from featstore.datasets.spair71k import CATEGORIES
from featstore.errors import BadRequestError, CorruptError, NotFoundError

IMAGES = {
    "cat": {
        "trn": ["2008_000003", "2007_000001"],
        "val": ["2009_000005", "2009_000006"],
        "test": ["2010-a", "2010-b-c"],
    },
    "tvmonitor": {"trn": ["2007_000001", "2011_000009"], "val": [], "test": []},
}
UNPAIRED = "cat/2012_000001.jpg"


def annotation(category: str, number: int) -> dict[str, object]:
    """Point 0 is always there, point 1 in every second image, point 2 never."""
    points = {"0": [3, 4 + number], "1": [7.5, 2] if number % 2 else None, "2": None}
    return {"filename": "x.jpg", "category": category, "bndbox": [1, 2, 11, 8], "kps": points, "azimuth_id": 3}


def write_set(root: Path) -> Path:
    """The tree of the archive: images of 12 x 9 px, annotations, lists of pairs and pairs."""
    folder = root / "SPair-71k"
    lines: dict[str, list[str]] = {"trn": [], "val": [], "test": []}
    number = 0
    for category, splits in IMAGES.items():
        for kind in ("JPEGImages", "ImageAnnotation"):
            (folder / kind / category).mkdir(parents=True)
        for split, stems in splits.items():
            for stem in stems:
                Image.new("RGB", (12, 9), (number, 0, 0)).save(folder / "JPEGImages" / category / f"{stem}.jpg")
                (folder / "ImageAnnotation" / category / f"{stem}.json").write_text(
                    json.dumps(annotation(category, number))
                )
                number += 1
            for a in stems:
                lines[split] += [f"{len(lines[split]):06d}-{a}-{b}:{category}" for b in stems if a != b]
    Image.new("RGB", (12, 9)).save(folder / "JPEGImages" / UNPAIRED)
    (folder / "Layout" / "large").mkdir(parents=True)
    for split, names in lines.items():
        (folder / "Layout" / "large" / f"{split}.txt").write_text("\n".join(names) + "\n")
        (folder / "PairAnnotation" / split).mkdir(parents=True)
        for name in names:
            (folder / "PairAnnotation" / split / f"{name}.json").write_text("{}")
    return folder


def test_images_come_split_by_split_and_category_by_category(tmp_path: Path) -> None:
    write_set(tmp_path)
    dataset = resolve("spair71k", data_root=tmp_path)
    assert [(sample.key, sample.split) for sample in dataset.samples] == [
        ("cat/2007_000001.jpg", "train"),
        ("cat/2008_000003.jpg", "train"),
        ("tvmonitor/2007_000001.jpg", "train"),
        ("tvmonitor/2011_000009.jpg", "train"),
        ("cat/2009_000005.jpg", "val"),
        ("cat/2009_000006.jpg", "val"),
        ("cat/2010-a.jpg", "test"),
        ("cat/2010-b-c.jpg", "test"),
        ("cat/2012_000001.jpg", "all"),
    ]
    assert dataset.image("cat/2010-a.jpg").shape == (9, 12, 3)
    assert dataset.mask("cat/2010-a.jpg") is None
    info = dataset.info
    assert (info.name, info.model) == ("spair71k", "sd15")
    # as in the paper
    assert info.prompt == (
        "a photo of aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dog, horse, motorbike, person, "
        "potted plant, sheep, train, tv monitor, high quality, best quality, highly realistic, masterpiece, "
        "high resolution"
    )
    assert len(set(CATEGORIES)) == 18


@pytest.mark.parametrize("layout", [True, False])
def test_pairs_are_those_of_the_lists_or_of_the_names_of_pairs(tmp_path: Path, layout: bool) -> None:
    folder = write_set(tmp_path)
    if not layout:
        shutil.rmtree(folder / "Layout")
    pairs = resolve("spair71k", data_root=tmp_path).pairs
    assert pairs is not None
    assert len(pairs) == 8
    assert pairs[0] == Pair(source="cat/2008_000003.jpg", target="cat/2007_000001.jpg", split="train")
    assert pairs[-1] == Pair(source="cat/2010-b-c.jpg", target="cat/2010-a.jpg", split="test")
    assert [pair.split for pair in pairs] == ["train"] * 4 + ["val"] * 2 + ["test"] * 2


def test_points_lie_at_centres_of_pixels_and_the_box_stays(tmp_path: Path) -> None:
    write_set(tmp_path)
    points = resolve("spair71k", data_root=tmp_path).keypoints("cat/2007_000001.jpg")
    assert points is not None
    assert points.names == ("0", "1", "2")
    assert points.visible.tolist() == [True, True, False]
    assert points.xy_px.dtype == np.float32
    assert points.xy_px[:2].tolist() == [[3.5, 5.5], [8.0, 2.5]]
    assert points.box_px == (1.0, 2.0, 11.0, 8.0)
    assert points.category == "cat"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kps": {"0": [1]}}, "point '0' is [1]"),
        ({"kps": {"0": [1, "2"]}}, "point '0'"),
        ({"kps": {"0": [1, True]}}, "point '0'"),
        ({"kps": {"0": [1, 1e999]}}, "point '0'"),
        ({"kps": {"0": 7}}, "point '0'"),
        ({"kps": [[1, 2]]}, "no annotation"),
        ({"kps": None}, "no annotation"),
        ({"bndbox": [1, 2, 3]}, "bndbox is [1, 2, 3]"),
        ({"bndbox": [5, 2, 5, 9]}, "no extent"),
        ({"bndbox": "box"}, "bndbox"),
        ({"category": "dog"}, "of category 'dog'"),
    ],
)
def test_annotations_that_are_none_are_unreadable(tmp_path: Path, change: dict[str, object], text: str) -> None:
    folder = write_set(tmp_path)
    path = folder / "ImageAnnotation" / "cat" / "2007_000001.json"
    path.write_text(json.dumps(annotation("cat", 1) | change))
    dataset = resolve("spair71k", data_root=tmp_path)
    with pytest.raises(UnreadableImageError) as caught:
        dataset.keypoints("cat/2007_000001.jpg")
    assert str(path) in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"category": "cat"}', None])
def test_damaged_and_absent_annotations_are_unreadable(tmp_path: Path, content: str | None) -> None:
    path = write_set(tmp_path) / "ImageAnnotation" / "cat" / "2007_000001.json"
    path.unlink() if content is None else path.write_text(content)
    dataset = resolve("spair71k", data_root=tmp_path)
    with pytest.raises(UnreadableImageError, match=r"2007_000001\.json"):
        dataset.keypoints("cat/2007_000001.jpg")
    with pytest.raises(BadRequestError, match="cat/nobody"):
        dataset.keypoints("cat/nobody.jpg")


def test_absent_data_says_where_it_belongs_and_where_it_is_from(tmp_path: Path) -> None:
    entry = DATASETS["spair71k"]
    assert entry.where(tmp_path) == tmp_path / "SPair-71k"
    assert not entry.present(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        resolve("spair71k", data_root=tmp_path)
    assert str(tmp_path / "SPair-71k" / "JPEGImages") in str(caught.value)
    assert caught.value.hint is not None
    for part in ("SPair-71k.tar.gz", "cvlab.postech.ac.kr", str(tmp_path), "--data-root", "$FEATSTORE_DATA"):
        assert part in caught.value.hint
    write_set(tmp_path)
    assert entry.present(tmp_path)


def test_lists_that_name_absent_images_are_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path)
    (folder / "JPEGImages" / "cat" / "2009_000005.jpg").unlink()
    with pytest.raises(NotFoundError, match=r"names 2 of 2 pairs .*'000000-2009_000005-2009_000006:cat'") as caught:
        resolve("spair71k", data_root=tmp_path)
    assert str(folder / "Layout" / "large" / "val.txt") in str(caught.value)


@pytest.mark.parametrize("line", ["nonsense", "000001-2009_000005:cat", "000001-2009_000005-2009_000006:dog", ":"])
def test_lines_that_are_no_pairs_are_refused(tmp_path: Path, line: str) -> None:
    folder = write_set(tmp_path)
    (folder / "Layout" / "large" / "val.txt").write_text(line)
    with pytest.raises(NotFoundError, match="names 1 of 1 pairs"):
        resolve("spair71k", data_root=tmp_path)


def test_half_a_set_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path)
    shutil.rmtree(folder / "Layout")
    shutil.rmtree(folder / "PairAnnotation" / "test")
    with pytest.raises(NotFoundError, match=r"neither .*test\.txt nor .*test is there"):
        resolve("spair71k", data_root=tmp_path)


def test_an_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path)
    with (folder / "Layout" / "large" / "test.txt").open("a") as stream:
        stream.write("000009-2010-a-2007_000001:cat\n")
    with pytest.raises(CorruptError, match=r"'cat/2007_000001\.jpg' is in pairs of 'train' and of 'test'"):
        resolve("spair71k", data_root=tmp_path)

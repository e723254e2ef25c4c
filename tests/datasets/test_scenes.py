"""ADE20K and Cityscapes, from tiny files in their own layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featstore.datasets import DATASETS, UnreadableImageError, resolve
from featstore.errors import NotFoundError

CITIES = {"train": ("aachen_000000_000019", "ulm_000001_000019"), "val": ("lindau_000002_000019",)}


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    """Two training images, the second one without labels, and one of validation, 20 x 30."""
    root = tmp_path / "ADEChallengeData2016"
    for folder, name in (("training", "ADE_train_00000002"), ("training", "ADE_train_00000001")):
        save(root / "images" / folder / f"{name}.jpg", np.full((20, 30, 3), 90, np.uint8))
    save(root / "images" / "validation" / "ADE_val_00000001.jpg", np.full((20, 30, 3), 200, np.uint8))
    labels = (np.arange(600) % 151).astype(np.uint8).reshape(20, 30)
    save(root / "annotations" / "training" / "ADE_train_00000001.png", labels)
    save(root / "annotations" / "validation" / "ADE_val_00000001.png", labels[::-1])
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n")
    (root / "images" / "training" / ".DS_Store").write_bytes(b"")
    return root


@pytest.fixture
def cityscapes(tmp_path: Path) -> Path:
    """Two cities that train, one that validates, one that tests; identities 0..39 and 255 in the labels."""
    root = tmp_path / "cityscapes"
    ids = np.concatenate([np.arange(40), [255] * 10]).astype(np.uint8).reshape(5, 10)
    for split, names in {**CITIES, "test": ("berlin_000000_000019",)}.items():
        for name in names:
            city = name.split("_", maxsplit=1)[0]
            save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", np.full((5, 10, 3), 7, np.uint8))
            save(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", ids)
            save(root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", ids)
            save(root / "gtFine" / split / city / f"{name}_gtFine_color.png", np.zeros((5, 10, 4), np.uint8))
    return root


def test_ade20k_in_its_layout(ade: Path, tmp_path: Path) -> None:
    dataset = resolve("ade20k", data_root=tmp_path)
    assert [(sample.key, sample.split) for sample in dataset.samples] == [
        ("training/ADE_train_00000001.jpg", "train"),
        ("training/ADE_train_00000002.jpg", "train"),
        ("validation/ADE_val_00000001.jpg", "val"),
    ]
    assert dataset.image("validation/ADE_val_00000001.jpg").shape == (20, 30, 3)
    mask = dataset.mask("training/ADE_train_00000001.jpg")
    expected = (np.arange(600) % 151 - 1).reshape(20, 30)
    expected[expected < 0] = 255
    np.testing.assert_array_equal(mask, expected)
    assert mask.dtype == np.uint8
    assert dataset.mask("training/ADE_train_00000002.jpg") is None


def test_ade20k_s_classes_are_the_benchmark_s(ade: Path, tmp_path: Path) -> None:
    info = resolve("ade20k", data_root=tmp_path).info
    assert (info.name, info.model, info.label_size_px, info.ignore_label) == ("ade20k", "sd15", 512, 255)
    assert len(info.classes) == len(set(info.classes)) == 150
    # numbers of objectInfo150.txt, which count from 1
    for number, name in {
        1: "wall",
        13: "person",
        59: "screen door",
        90: "television",
        131: "screen",
        150: "flag",
    }.items():
        assert info.classes[number - 1] == name
    assert info.prompt.startswith("a highly realistic photo of the real world.")


def test_labels_of_the_full_ade20k_are_not_taken_for_the_benchmark_s(ade: Path, tmp_path: Path) -> None:
    save(ade / "annotations" / "validation" / "ADE_val_00000001.png", np.full((20, 30), 151, np.uint8))
    with pytest.raises(UnreadableImageError, match=r"ADE_val_00000001\.png: holds 151; labels .* are 0\.\.150"):
        resolve("ade20k", data_root=tmp_path).mask("validation/ADE_val_00000001.jpg")


def test_cityscapes_in_its_layout(cityscapes: Path, tmp_path: Path) -> None:
    dataset = resolve("cityscapes", data_root=tmp_path)
    assert [(sample.key, sample.split) for sample in dataset.samples] == [
        ("train/aachen/aachen_000000_000019.png", "train"),
        ("train/ulm/ulm_000001_000019.png", "train"),
        ("val/lindau/lindau_000002_000019.png", "val"),
        ("test/berlin/berlin_000000_000019.png", "test"),
    ]
    mask = dataset.mask("train/ulm/ulm_000001_000019.png")
    assert mask.dtype == np.uint8
    scored = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"}
    scored |= {20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"}
    scored |= {27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
    names = [dataset.info.classes[label] if label != 255 else None for label in mask.reshape(-1)]
    assert names == [scored.get(identity) for identity in range(40)] + [None] * 10
    assert dataset.info.classes == tuple(scored.values())
    assert (dataset.info.model, dataset.info.label_size_px) == ("sd15", None)
    # what stands for labels of the test images is none
    assert dataset.mask("test/berlin/berlin_000000_000019.png") is None


def test_training_labels_are_read_as_they_are(cityscapes: Path, tmp_path: Path) -> None:
    labels = np.full((5, 10), 18, np.uint8)
    labels[0] = 255
    save(cityscapes / "gtFine" / "train" / "ulm" / "ulm_000001_000019_gtFine_labelTrainIds.png", labels)
    (cityscapes / "gtFine" / "val" / "lindau" / "lindau_000002_000019_gtFine_labelIds.png").unlink()
    dataset = resolve("cityscapes", data_root=tmp_path)
    np.testing.assert_array_equal(dataset.mask("train/ulm/ulm_000001_000019.png"), labels)
    assert dataset.mask("train/aachen/aachen_000000_000019.png").max() == 255
    assert dataset.mask("val/lindau/lindau_000002_000019.png") is None


@pytest.mark.parametrize(
    ("name", "folder", "place", "source"),
    [
        ("ade20k", "ADEChallengeData2016", "images/training", "ADEChallengeData2016.zip (970 MB)"),
        ("cityscapes", "cityscapes", "leftImg8bit/train", "gtFine_trainvaltest.zip (241 MB)"),
    ],
)
def test_absent_data_says_where_it_belongs_and_where_it_is_from(
    tmp_path: Path, request: pytest.FixtureRequest, name: str, folder: str, place: str, source: str
) -> None:
    entry = DATASETS[name]
    assert entry.where(tmp_path) == tmp_path / folder
    assert not entry.present(tmp_path)
    with pytest.raises(NotFoundError) as caught:
        resolve(name, data_root=tmp_path)
    assert str(tmp_path / folder / place) in str(caught.value)
    assert caught.value.hint is not None
    for part in (source, str(tmp_path), "--data-root", "$FEATSTORE_DATA"):
        assert part in caught.value.hint
    assert source in entry.how_to_get
    request.getfixturevalue("ade" if name == "ade20k" else name)
    assert entry.present(tmp_path)


def test_half_a_set_is_absent(ade: Path, cityscapes: Path, tmp_path: Path) -> None:
    (ade / "images" / "validation" / "ADE_val_00000001.jpg").unlink()
    with pytest.raises(NotFoundError, match=r"images/validation$"):
        resolve("ade20k", data_root=tmp_path)
    (cityscapes / "leftImg8bit" / "val" / "lindau" / "lindau_000002_000019_leftImg8bit.png").unlink()
    with pytest.raises(NotFoundError, match=r"leftImg8bit/val/CITY$"):
        resolve("cityscapes", data_root=tmp_path)

"""toyhorse through the common interface."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from featstore.datasets import embedded, resolve
from featstore.datasets.toyhorse import CLASSES, KEYPOINTS, render_split
from featstore.errors import BadRequestError


@pytest.fixture(scope="module")
def rendered_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that a process left behind which rendered everything."""
    folder = tmp_path_factory.mktemp("rendered")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        assert len(resolve("toyhorse").samples) == 160
    return folder / "featstore"


@pytest.fixture
def warm(rendered_cache: Path, cache_folder: Path) -> Path:
    """The test's own copy of that cache; gives its one entry."""
    shutil.copytree(rendered_cache, cache_folder, dirs_exist_ok=True)
    (entry,) = (cache_folder / "toyhorse").iterdir()
    return entry


@pytest.mark.usefixtures("warm")
def test_samples_agree_with_the_renderer() -> None:
    dataset = resolve("toyhorse")
    samples = dataset.samples
    assert Counter(sample.split for sample in samples) == {"train": 30, "val": 30, "test": 100}
    assert [sample.key for sample in samples[29:32]] == ["train-029", "val-000", "val-001"]
    assert samples[-1].key == "test-099"
    assert len({sample.digest for sample in samples}) == 160
    for index in (0, 31, 159):
        picture, sample = render_split(index), samples[index]
        assert sample.digest == hashlib.sha256(picture.image.tobytes()).hexdigest()
        np.testing.assert_array_equal(dataset.image(sample.key), picture.image)
        np.testing.assert_array_equal(dataset.mask(sample.key), picture.parts)
        assert dataset.caption(sample.key, "plain") == picture.caption
        assert dataset.caption(sample.key, "fine") == picture.fine_caption


def test_shapes_and_names() -> None:
    dataset = resolve("toyhorse")
    image, mask = dataset.image("test-000"), dataset.mask("test-000")
    assert mask is not None
    assert (image.dtype, image.shape, mask.dtype, mask.shape) == (np.uint8, (64, 64, 3), np.uint8, (64, 64))
    assert len(dataset.info.classes) == 21
    assert mask.max() < 21
    assert dataset.info.prompt == "a horse, high quality, best quality, highly realistic, masterpiece"


def test_image_labels_are_coats_and_every_split_has_each_often_enough() -> None:
    dataset = resolve("toyhorse")
    coats = dataset.info.image_classes
    assert coats == ("strawberry roan", "blue roan", "dapple grey", "silver dapple")
    for index, sample in enumerate(dataset.samples):
        label = dataset.image_label(sample.key)
        assert coats[label] == render_split(index).coat
    for split, least in (("train", 5), ("val", 5), ("test", 18)):
        counts = Counter(dataset.image_label(sample.key) for sample in dataset.samples if sample.split == split)
        assert min(counts[label] for label in range(4)) >= least
    with pytest.raises(BadRequestError, match="no image 'test-100'"):
        dataset.image_label("test-100")


def test_what_is_handed_out_can_be_written_to() -> None:
    dataset = resolve("toyhorse")
    before = dataset.image("train-000").copy()
    dataset.image("train-000")[:] = 0
    mask = dataset.mask("train-000")
    assert mask is not None
    mask[:] = 7
    np.testing.assert_array_equal(dataset.image("train-000"), before)
    np.testing.assert_array_equal(dataset.mask("train-000"), render_split(0).parts)


@pytest.mark.usefixtures("warm")
def test_the_second_process_renders_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> None:
        raise AssertionError(f"picture {index} was rendered")

    monkeypatch.setattr(embedded, "render_split", refuse)
    dataset = resolve("toyhorse")
    assert len(dataset.samples) == 160
    assert dataset.caption_source
    with pytest.raises(AssertionError, match="picture 0 was rendered"):
        dataset.image("train-000")


def test_another_renderer_does_not_see_this_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = embedded._renderer_identity()
    assert identity is not None
    monkeypatch.setattr(embedded.PIL, "__version__", "99.0")
    assert embedded._renderer_identity() != identity


def test_a_damaged_cache_is_harmless(warm: Path) -> None:
    samples = resolve("toyhorse").samples
    whole = warm.read_bytes()
    at = whole.index(samples[5].digest.encode())
    warm.write_bytes(whole[:at] + samples[6].digest.encode() + whole[at + 64 :])
    assert resolve("toyhorse").samples == samples


@pytest.mark.usefixtures("warm")
def test_bad_keys_and_captions_are_refused() -> None:
    dataset = resolve("toyhorse")
    for key in ("train-030", "test-100", "0", ""):
        with pytest.raises(BadRequestError, match="train-000"):
            dataset.image(key)
    with pytest.raises(BadRequestError, match="plain, fine"):
        dataset.caption("train-000", "poem")
    assert dataset.caption_source is not None
    assert dataset.caption_source.startswith("toyhorse/fine/")


def test_keypoints_are_those_of_the_renderer() -> None:
    dataset, picture = resolve("toyhorse"), render_split(31)
    points = dataset.keypoints("val-001")
    assert points is not None
    assert points.names == KEYPOINTS
    assert points.category == "horse"
    np.testing.assert_array_equal(points.xy_px, picture.keypoints[:, :2])
    np.testing.assert_array_equal(points.visible, picture.keypoints[:, 2] == 1)
    assert points.box_px == picture.bbox
    x0, y0, x1, y1 = points.box_px
    horse = ~np.isin(picture.parts, [CLASSES.index("background"), CLASSES.index("person")])
    rows, columns = np.flatnonzero(horse.any(1)), np.flatnonzero(horse.any(0))
    assert (x0, y0, x1, y1) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert dataset.pairs is None
    points.xy_px[:] = 0
    again = dataset.keypoints("val-001")
    assert again is not None
    assert again.xy_px.any()

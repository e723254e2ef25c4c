from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from featstore.datasets import Keypoints
from featstore.errors import BadRequestError, IncompatibleError, NotCommittedError
from featstore.heads import load_head
from featstore.heads.correspondence import CorrespondenceHead, match
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig
from featstore.pipelines.progress import Silent
from featstore.pipelines.reading import BucketConfig, open_bucket
from featstore.pipelines.tasks import TASKS
from featstore.pipelines.tasks.base import LabelledRows
from featstore.pipelines.tasks.correspondence import Correspondence, draw_pairs, image_points
from featstore.pipelines.train_head import TrainHeadConfig, train_head

SPLITS = {"trn": range(6), "val": range(6, 8), "test": range(8, 12)}
CATEGORIES = ("bird", "cat")
METRICS = {"pck_img", "pck_bbox", "pck_img_point", "pck_bbox_point", "pck_bbox_auc"}
LAYERS = "up-level2-upsampler-out,up-level3-repeat2-vit-out"


def write_set(root):
    """Discs of several sizes in SPair-71k's layout, with three points on each; the third is hidden in odd images."""
    rng = np.random.default_rng(0)
    folder = root / "SPair-71k"
    lines = {split: [] for split in SPLITS}
    for category, colour in zip(CATEGORIES, ([210, 120, 40], [60, 200, 90]), strict=True):
        for kind in ("JPEGImages", "ImageAnnotation"):
            (folder / kind / category).mkdir(parents=True)
        for split, numbers in SPLITS.items():
            for number in numbers:
                width, height = 80 + 4 * number, 60
                y, x = np.mgrid[:height, :width]
                cx, cy, r = int(rng.integers(25, 55)), int(rng.integers(20, 40)), 14
                disc = ((y - cy) ** 2 + (x - cx) ** 2 < r**2)[..., None]
                pixels = np.where(disc, colour, [90, 90, 160]) + rng.integers(-30, 30, (height, width, 3))
                name = f"2007_{number:06d}"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"JPEGImages/{category}/{name}.jpg")
                document = {
                    "category": category,
                    "bndbox": [cx - r, cy - r, cx + r, cy + r],
                    "kps": {"0": [cx - r, cy], "1": [cx, cy], "2": None if number % 2 else [cx + r, cy]},
                }
                (folder / f"ImageAnnotation/{category}/{name}.json").write_text(json.dumps(document))
            lines[split] += [f"{a:03d}-2007_{a:06d}-2007_{b:06d}:{category}" for a in numbers for b in numbers if a < b]
    (folder / "Layout" / "large").mkdir(parents=True)
    for split, names in lines.items():
        (folder / "Layout" / "large" / f"{split}.txt").write_text("\n".join(names))
    return root


def extracted(root, store):
    return extract(
        ExtractConfig(
            dataset="spair71k",
            techniques="basic,prompt",
            store=str(store),
            model="reference",
            data_root=root,
            device="cpu",
            batch_size=8,
        )
    )


@pytest.fixture(scope="module")
def spair(weights_root, tmp_path_factory):
    """Data root and store; read only."""
    root = write_set(tmp_path_factory.mktemp("data"))
    store = tmp_path_factory.mktemp("store") / "features.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATSTORE_WEIGHTS", str(weights_root))
        extracted(root, store)
    return root, store


@pytest.fixture
def bucket(spair):
    def make(**changes):
        values = {"dataset": "spair71k", "techniques": "basic", "data_root": spair[0], "store": str(spair[1])}
        return BucketConfig(**(values | {"layers": LAYERS} | changes))

    return make


@pytest.fixture
def config(bucket):
    def make(**changes):
        where = {name: changes.pop(name) for name in ("techniques", "data_root", "store", "dataset") if name in changes}
        values = {"task": "correspondence", "splits": 1, "max_steps": 20, "device": "cpu"}
        return TrainHeadConfig(bucket=bucket(**where), **(values | changes))

    return make


def prepared(config, *, skip_missing=False, progress=None):
    rows = LabelledRows(config=config, skip_missing=skip_missing)
    return Correspondence(open_bucket(config), rows, progress or Silent())


class Notes(Silent):
    def __init__(self):
        self.notes, self.started = [], []

    def note(self, text):
        self.notes.append(text)

    def start(self, title, total, unit):
        self.started.append((title, total, unit))


def test_the_first_head_is_the_default():
    assert TASKS["correspondence"].heads == ("conv", "nn")
    assert TASKS["correspondence"].metrics[:2] == ("pck_img", "pck_bbox")


def test_a_head_is_trained_on_the_set_s_own_pairs_and_written(config, tmp_path):
    progress = Notes()
    report = train_head(config(techniques="basic,prompt", assigners=2, out=tmp_path / "head"), progress)
    assert progress.started == [("training, split 1 of 1", 20, "steps")]
    assert set(report.to_json()["metrics"]) == METRICS
    assert all(0 <= metric.mean <= 1 for metric in report.metrics.values())
    metrics = report.results[0].metrics
    assert (metrics["train_pairs"], metrics["pairs"]) == (30, 12)  # 15 and 6 of each category, in one order
    # pairs of images with even numbers have three points in common, the others two
    assert metrics["points"] == 2 * (1 * 3 + 5 * 2)
    assert sorted(metrics["per_category"]) == ["bird", "cat"]
    assert np.shape(metrics["assigner_weights"]["up-level3-repeat2-vit-out"]) == (2, 2)
    head = load_head(tmp_path / "head")
    assert isinstance(head, CorrespondenceHead)
    assert [run.name for run in head.features.runs] == ["basic", "prompt"]


def test_nearest_neighbours_take_no_step(config):
    progress = Notes()
    report = train_head(config(head="nn"), progress)
    assert report.results[0].metrics["steps"] == 0
    assert progress.started == []
    assert report.results[0].metrics["assigner_weights"] == {}


def test_drawn_splits_have_drawn_pairs(config):
    report = train_head(config(head="nn", splits=2))
    own, drawn = (result.metrics for result in report.results)
    assert own["train_images"] == drawn["train_images"] == 12
    assert own["train_pairs"] == 30
    assert drawn["train_pairs"] > 30  # both orders of all pairs of one category


def test_a_head_is_scored_as_it_was_after_training(bucket, config, tmp_path):
    report = train_head(config(out=tmp_path / "head"))
    task = prepared(bucket())
    rows = np.flatnonzero([name == "test" for name in task.bucket.stored.samples.splits])
    again = task.score(load_head(tmp_path / "head"), rows, Silent())
    assert again == {name: report.results[0].metrics[name] for name in again}


def test_matches_lie_where_the_points_are_in_pixels_of_the_image(bucket, config, tmp_path):
    """The images have another shape than the model's input: a point still finds itself."""
    train_head(config(head="nn", out=tmp_path / "head"))
    task, head = prepared(bucket()), load_head(tmp_path / "head")
    for row, points in list(task.points.items())[:4]:
        key = task.bucket.stored.samples.keys[row]
        assert points.size_px == task.bucket.dataset.image(key).shape[:2]
        found = match(head, task.features(), row, row, points.xy[points.visible])
        cell_px = np.array(points.size_px[::-1]) / head.grid[::-1]
        off = np.abs(found.xy * points.size_px[::-1] - task.bucket.dataset.keypoints(key).xy_px[points.visible])
        assert (off <= cell_px).all()


def test_a_data_set_without_points_is_refused(labelled, features):
    config = TrainHeadConfig(
        bucket=BucketConfig(dataset=f"folder:{labelled}", techniques="basic", store=str(features)),
        task="correspondence",
    )
    with pytest.raises(BadRequestError, match="'discs' has no keypoints") as caught:
        train_head(config)
    assert "spair71k" in caught.value.hint


def test_missing_features_are_refused_or_left_out(spair, bucket, config, tmp_path):
    root = shutil.copytree(spair[0], tmp_path / "data")
    Image.new("RGB", (64, 64)).save(root / "SPair-71k" / "JPEGImages" / "cat" / "2007_000000.jpg")
    with pytest.raises(NotCommittedError, match="1 of 24 labelled images") as caught:
        train_head(config(data_root=root))
    assert "featstore extract" in caught.value.hint
    report = train_head(config(data_root=root, head="nn", skip_missing=True))
    assert report.results[0].metrics["train_images"] == 11


def test_damaged_annotations_are_left_out_with_a_note(spair, bucket, config, tmp_path):
    root = shutil.copytree(spair[0], tmp_path / "data")
    (root / "SPair-71k" / "ImageAnnotation" / "cat" / "2007_000000.json").write_text("{")
    progress = Notes()
    report = train_head(config(data_root=root, head="nn"), progress)
    assert "'cat/2007_000000.jpg'" in progress.notes[0]
    assert report.results[0].metrics["train_images"] == 11


def test_one_image_with_points_is_refused(spair, bucket, tmp_path):
    root = shutil.copytree(spair[0], tmp_path / "data")
    for path in sorted((root / "SPair-71k" / "ImageAnnotation").rglob("*.json"))[1:]:
        document = json.loads(path.read_text())
        path.write_text(json.dumps(document | {"kps": dict.fromkeys(document["kps"])}))
    with pytest.raises(BadRequestError, match="1 images of 'spair71k' with points are usable"):
        prepared(bucket(data_root=root))


def test_a_split_without_a_pair_is_refused(spair, config, tmp_path):
    root = shutil.copytree(spair[0], tmp_path / "data")
    for path in (root / "SPair-71k" / "ImageAnnotation").rglob("2007_0000*.json"):
        document = json.loads(path.read_text())
        number = int(path.stem[-2:])
        if number in SPLITS["test"]:  # each shows a point that no other one shows
            path.write_text(json.dumps(document | {"kps": {f"only {number}": [3, 3]}}))
    with pytest.raises(BadRequestError, match="the 8 test images of 'spair71k' have no pair"):
        train_head(config(data_root=root))


def test_heads_of_other_kinds_are_refused(bucket, labelled, features, tmp_path):
    pixels = TrainHeadConfig(
        bucket=BucketConfig(dataset=f"folder:{labelled}", techniques="basic", store=str(features)),
        ensemble=1,
        splits=1,
        max_steps=2,
        device="cpu",
        out=tmp_path / "head",
    )
    train_head(pixels)
    with pytest.raises(IncompatibleError, match="a 'pixel' head finds no points"):
        prepared(bucket()).score(load_head(tmp_path / "head"), np.arange(4), Silent())


def keypoints(**changes):
    values = {
        "names": ("nose", "tail"),
        "xy_px": np.array([[10, 5], [40, 20.5]], np.float32),
        "visible": np.array([True, True]),
        "box_px": (0, 0, 20, 20),
        "category": "horse",
    }
    return Keypoints(**(values | changes))


def test_points_become_shares_of_the_image():
    points = image_points(keypoints(), (20, 40))
    assert points.xy.tolist() == [[0.25, 0.25], [1, 1]]  # the second one lies half a pixel below the image
    np.testing.assert_allclose(points.xy_px, [[10, 5], [40, 20]])
    assert points.box_px == (0, 0, 20, 20)


def test_all_pairs_are_drawn_where_they_are_few():
    points = {
        row: image_points(keypoints(category="horse" if row < 4 else "cow"), (20, 40)) for row in (0, 1, 3, 5, 8, 9, 11)
    }
    points[3] = dataclasses.replace(points[3], visible=np.array([False, True]))
    points[0] = dataclasses.replace(points[0], visible=np.array([True, False]))  # nothing in common with row 3
    found = {tuple(pair) for pair in draw_pairs(points, np.array([0, 1, 3, 5, 8, 9]), 100).tolist()}
    wanted = {(a, b) for group in ((0, 1, 3), (5, 8, 9)) for a in group for b in group if a != b} - {(0, 3), (3, 0)}
    assert found == wanted


def test_a_sample_of_pairs_has_no_repetition_and_is_the_same_again():
    points = {row: image_points(keypoints(), (20, 40)) for row in range(300)}
    pairs = draw_pairs(points, np.arange(300), 500)
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs) == 500
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len(np.unique(pairs)) > 250
    np.testing.assert_array_equal(pairs, draw_pairs(points, np.arange(300), 500))


def test_an_image_alone_in_its_category_has_no_pair():
    points = {0: image_points(keypoints(), (20, 40)), 1: image_points(keypoints(category="cow"), (20, 40))}
    assert draw_pairs(points, np.array([0, 1]), 10).shape == (0, 2)

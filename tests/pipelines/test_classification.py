from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from featstore.datasets.folder import FolderDataset
from featstore.errors import BadRequestError, IncompatibleError, NotCommittedError
from featstore.heads import ClassificationHead, load_head
from featstore.pipelines.baseline import BaselineConfig
from featstore.pipelines.evaluate import EvaluateConfig, evaluate
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig
from featstore.pipelines.predict import PredictConfig, predict
from featstore.pipelines.reading import BucketConfig
from featstore.pipelines.train_head import TrainHeadConfig, train_head
from featstore.techniques import SteeringOptions

SQUARES_PX = {"fire": 32, "sea": 4}
"""Sides of the squares of each class' pictures."""
LAYER = "up-level3-repeat2-vit-out"


def draw(folder, counts, seed=0):
    """Noisy chess boards of one size of squares a class, as SPLIT/CLASS/0.png and so on."""
    rng = np.random.default_rng(seed)
    for (split, name), count in counts.items():
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            board = (np.indices((64, 64)) // SQUARES_PX.get(name, 16)).sum(0) % 2
            pixels = 40 + 150 * board[..., None] + rng.integers(-40, 40, (64, 64, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


def extracted(folder, store, techniques="basic"):
    steering = SteeringOptions(prompt="a photo, high quality") if "prompt" in techniques else SteeringOptions()
    dataset = f"folder:{folder}"
    wanted = ExtractConfig(
        dataset=dataset, techniques=techniques, store=str(store), model="reference", device="cpu", steering=steering
    )
    extract(wanted)
    return {"dataset": dataset, "store": str(store)}


@pytest.fixture(scope="module")
def boards(weights_root, tmp_path_factory):
    """Data set and store of two classes, 5 train and 3 test images each; read only."""
    root = tmp_path_factory.mktemp("boards")
    counts = {(split, name): n for split, n in (("train", 5), ("test", 3)) for name in SQUARES_PX}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATSTORE_WEIGHTS", str(weights_root))
        return extracted(draw(root / "boards", counts), root / "features.zarr", "basic,prompt")


@pytest.fixture
def config(boards):
    def make(**changes):
        given = {name: changes.pop(name) for name in ("dataset", "store") if name in changes}
        bucket = BucketConfig(
            **(boards | given), techniques=changes.pop("techniques", "basic"), layers=changes.pop("layers", LAYER)
        )
        values = {"task": "classification", "splits": 1, "max_steps": 30, "device": "cpu", "assigners": 2}
        return TrainHeadConfig(bucket=bucket, **(values | changes))

    return make


@pytest.mark.parametrize("head", ["conv", "linear"])
def test_a_head_learns_is_saved_scored_again_and_used(head, config, boards, tmp_path, tiny):
    out = tmp_path / "head"
    report = train_head(config(head=head, techniques="basic,prompt", layers=None, out=out, max_steps=60))
    # what a random model tells of pictures can be learnt by heart; that heads learn is for the tests of heads
    assert report.results[0].metrics["loss"] < 0.5
    assert set(report.metrics) == {
        *("accuracy", "mean_class_accuracy", "auroc", "average_precision", "calibration_error", "aurc")
    }
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert [one["class"] for one in value["per_class"]] == ["fire", "sea"]
    assert "baseline" not in value
    assert np.shape(report.results[0].metrics["assigner_weights"][LAYER]) == (2, 2)

    loaded = load_head(out)
    assert isinstance(loaded, ClassificationHead)
    assert (loaded.classes, loaded.config.form) == (("fire", "sea"), head)
    again = evaluate(EvaluateConfig(head=out, store=boards["store"], device="cpu"))
    assert again.summary == {name: metric.mean for name, metric in report.metrics.items()}
    assert again.images == 6

    used = predict(PredictConfig(head=out, store=boards["store"], out=tmp_path / "said", device="cpu"))
    said = {one["key"]: one["class"] for one in used.predictions["images"]}
    expected = [("fire", "sea")[label] for label in report.results[0].predictions]
    assert said == dict(zip([f"test/{name}/{n}.png" for name in SQUARES_PX for n in range(3)], expected, strict=True))
    with (tmp_path / "said" / "classes.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert {row["image"]: row["class"] for row in table} == said
    for row, one in zip(table, used.predictions["images"], strict=True):
        assert [float(row["fire"]), float(row["sea"])] == one["probabilities"]
        assert sum(one["probabilities"]) == pytest.approx(1, abs=1e-6)


def test_the_head_is_used_on_new_images(config, tmp_path, tiny):
    train_head(config(out=tmp_path / "head", max_steps=60))
    folder = draw(tmp_path / "new", {(".", "sea"): 2}, seed=5)
    used = predict(
        PredictConfig(
            head=tmp_path / "head",
            images=(folder / "sea",),
            store=str(tmp_path / "new.zarr"),
            model="reference",
            out=tmp_path / "said",
            device="cpu",
        )
    )
    assert [one["key"] for one in used.predictions["images"]] == ["0.png", "1.png"]
    assert {one["class"] for one in used.predictions["images"]} <= {"fire", "sea"}


def test_conv_is_the_default_and_options_reach_the_head(config):
    result = train_head(config(techniques="basic,prompt", per_channel=True, max_steps=2, seed=3)).results[0]
    assert (result.head.config.form, result.head.config.per_channel, result.head.config.assigners) == ("conv", True, 2)
    assert result.metrics["steps"] == 2
    assert result.metrics["train_images"] == 10
    with pytest.raises(BadRequestError, match="unknown head for classification 'pixel'; known: conv, linear"):
        config(head="pixel")


def test_splits_are_the_set_s_own_and_drawn_ones(config):
    report = train_head(config(head="linear", splits=3))
    assert len(report.metrics["accuracy"].splits) == 3
    first, *others = (result.test_rows.tolist() for result in report.results)
    assert first == [0, 1, 2, 3, 4, 5]  # test/.. stands first in the table
    assert all(len(rows) == 6 and rows != first for rows in others)


def test_a_test_split_of_one_class_has_no_auroc_and_that_is_no_error(config, tmp_path, tiny):
    counts = {("train", "fire"): 2, ("train", "sea"): 2, ("test", "sea"): 2}
    where = extracted(draw(tmp_path / "few", counts), tmp_path / "few.zarr")
    report = train_head(config(head="linear", out=tmp_path / "head", **where))
    assert "auroc" not in report.metrics
    assert report.metrics["accuracy"].mean in (0, 0.5, 1)
    assert report.results[0].metrics["auroc"] is None
    again = evaluate(EvaluateConfig(head=tmp_path / "head", store=where["store"], device="cpu"))
    assert "auroc" not in again.summary


def test_a_class_without_training_images_is_named(config, tmp_path, tiny, caplog):
    counts = {("train", "fire"): 2, ("train", "sea"): 2, ("test", "grass"): 1, ("test", "sea"): 1}
    where = extracted(draw(tmp_path / "grass", counts), tmp_path / "grass.zarr")
    report = train_head(config(max_steps=3, **where))
    assert report.results[0].metrics["absent_from_training"] == ["grass"]
    assert "cannot learn: grass" in caplog.text


def test_images_without_labels_are_refused(config, labelled, features):
    with pytest.raises(BadRequestError, match="'discs' has no labels of whole images") as caught:
        train_head(config(dataset=f"folder:{labelled}", store=str(features)))
    assert "train/CLASS/" in caught.value.hint


def test_one_class_is_refused(config, tmp_path, tiny):
    counts = {("train", "sea"): 2, ("test", "sea"): 1}
    where = extracted(draw(tmp_path / "one", counts), tmp_path / "one.zarr")
    with pytest.raises(BadRequestError, match="'one' has one class only, 'sea'"):
        train_head(config(**where))


def test_training_images_of_one_class_are_refused(config, tmp_path, tiny):
    counts = {("train", "sea"): 2, ("test", "sea"): 1, ("test", "fire"): 1}
    where = extracted(draw(tmp_path / "half", counts), tmp_path / "half.zarr")
    with pytest.raises(BadRequestError, match="all 2 training images are of one class, 'sea'"):
        train_head(config(**where))


def test_a_label_outside_the_classes_is_refused(config, monkeypatch):
    monkeypatch.setattr(FolderDataset, "image_label", lambda self, key: 7 if key == "train/sea/1.png" else 0)
    with pytest.raises(BadRequestError, match=r"label of 'train/sea/1\.png' is 7, which is outside 0\.\.1") as caught:
        train_head(config())
    assert "fire, sea" in caught.value.hint


def test_images_without_a_label_do_not_count(config, monkeypatch):
    own = FolderDataset.image_label
    monkeypatch.setattr(
        FolderDataset, "image_label", lambda self, key: None if key.endswith("0.png") else own(self, key)
    )
    metrics = train_head(config(max_steps=2)).results[0].metrics
    assert (metrics["train_images"], metrics["test_images"]) == (8, 4)


def test_missing_features_are_named_with_the_command(config, boards, tmp_path):
    folder = shutil.copytree(boards["dataset"].removeprefix("folder:"), tmp_path / "boards")
    draw(folder, {("train", "fire"): 6}, seed=9)
    with pytest.raises(NotCommittedError, match="6 of 17 labelled images") as caught:
        train_head(config(dataset=f"folder:{folder}"))
    assert "featstore extract" in caught.value.hint


def test_heads_of_another_kind_or_other_classes_are_not_scored(config, boards, tmp_path, labelled, features):
    train_head(
        TrainHeadConfig(
            bucket=BucketConfig(dataset=f"folder:{labelled}", techniques="basic", store=str(features), layers=LAYER),
            **{"ensemble": 2, "splits": 1, "max_steps": 2, "device": "cpu", "out": tmp_path / "pixel"},
        )
    )
    document = json.loads((tmp_path / "pixel" / "head.json").read_text())
    assert document["kind"] == "pixel"
    with pytest.raises(BadRequestError, match="has no labels"):
        evaluate(
            EvaluateConfig(head=tmp_path / "pixel", store=boards["store"], dataset=boards["dataset"], device="cpu")
        )
    report = train_head(config(max_steps=2))
    head = report.results[0].head
    head.classes = ("sea", "fire")
    with pytest.raises(IncompatibleError, match="head of other classes cannot be scored on 'boards'"):
        prepared(config()).score(head, np.array([0]), None)
    with pytest.raises(IncompatibleError, match="a 'pixel' head"):
        prepared(config()).score(load_head(tmp_path / "pixel"), np.array([0]), None)


def test_every_row_gets_the_label_of_its_own_image(config):
    task = prepared(config())
    expected = [("fire", "sea").index(key.split("/")[1]) for key in task.bucket.stored.samples.keys]
    assert task.labels.tolist() == expected
    assert task.bucket.classes == ("fire", "sea")


def prepared(config):
    from featstore.pipelines.progress import Silent
    from featstore.pipelines.reading import open_bucket
    from featstore.pipelines.tasks.base import LabelledRows
    from featstore.pipelines.tasks.classification import Classification

    return Classification(open_bucket(config.bucket), LabelledRows(config=config.bucket), Silent())


def test_a_baseline_is_trained_on_the_same_splits(config):
    report = train_head(config(head="linear", splits=2, max_steps=2, baseline=BaselineConfig(batch_size=4)))
    assert len(report.baseline["accuracy"].splits) == 2
    assert set(report.to_json()["baseline"]) == set(report.metrics)


def test_a_baseline_belongs_to_classification(config):
    with pytest.raises(BadRequestError, match="segmentation has no baseline 'resnet50'") as caught:
        config(task="segmentation", baseline=BaselineConfig())
    assert "train for classification" in caught.value.hint

"""A head that was saved: scored again, and used on images that nothing is known of."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from featstore.errors import BadRequestError, IncompatibleError, NotCommittedError, NotFoundError
from featstore.pipelines.evaluate import EvaluateConfig, evaluate
from featstore.pipelines.predict import PredictConfig, predict
from featstore.pipelines.progress import Silent
from featstore.pipelines.reading import BucketConfig
from featstore.pipelines.train_head import TrainHeadConfig, train_head
from featstore.recipe import canonical_json, sha256_hex

pytestmark = pytest.mark.usefixtures("tiny")

LAYERS = "up-level3-repeat2-vit-out,attn-up-cross-2"


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def trained(labelled, features, tmp_path_factory):
    """A head for discs on a dark ground, its folder and report."""
    folder = tmp_path_factory.mktemp("heads") / "discs"
    report = train_head(
        TrainHeadConfig(
            bucket=BucketConfig(
                dataset=f"folder:{labelled}", techniques="basic,prompt", store=str(features), layers=LAYERS
            ),
            ensemble=2,
            splits=1,
            max_steps=300,
            device="cpu",
            out=folder,
        )
    )
    return folder, report


@pytest.fixture
def store(features, tmp_path):
    return str(shutil.copytree(features, tmp_path / "features.zarr"))


def test_a_saved_head_scores_what_it_scored(trained, features):
    folder, report = trained
    found = evaluate(EvaluateConfig(head=folder, store=str(features), device="cpu"))
    assert (found.task, found.split, found.images) == ("segmentation", "test", 3)
    assert found.summary == {name: metric.mean for name, metric in report.metrics.items()}
    json.dumps(found.to_json(), allow_nan=False)


def test_scores_on_what_it_was_trained_on_are_called_that(trained, features):
    progress = Notes()
    found = evaluate(EvaluateConfig(head=trained[0], store=str(features), split="train", device="cpu"), progress)
    assert found.images == 5
    assert len(progress.notes) == 1
    assert "trained on these images" in progress.notes[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"split": "tset"}, BadRequestError, "nearest|did you mean|test"),
        ({"store": "nowhere.zarr"}, NotCommittedError, "nowhere"),
        ({"dataset": "toyhorse"}, NotCommittedError, "toyhorse"),
    ],
)
def test_what_cannot_be_scored_is_refused(trained, features, changes, error, message):
    with pytest.raises(error, match=message):
        evaluate(EvaluateConfig(**({"head": trained[0], "store": str(features), "device": "cpu"} | changes)))


def test_there_has_to_be_a_head(tmp_path):
    with pytest.raises(NotFoundError, match="no head"):
        evaluate(EvaluateConfig(head=tmp_path))


def changed_document(folder, target, change):
    """A copy of the head whose document ``change`` was applied to, its digest made right again."""
    shutil.copytree(folder, target)
    document = json.loads((target / "head.json").read_text())
    del document["sha256"]
    change(document)
    document["sha256"] = sha256_hex(canonical_json(document))
    (target / "head.json").write_text(json.dumps(document))
    return target


@pytest.mark.parametrize("name", ["task", "recipes", "techniques", "dataset"])
def test_a_head_of_unknown_origin_cannot_be_used(trained, tmp_path, name):
    folder = changed_document(trained[0], tmp_path / "head", lambda document: document["extra"].pop(name))
    with pytest.raises(IncompatibleError, match="does not say"):
        evaluate(EvaluateConfig(head=folder))


def test_runs_of_another_recipe_are_refused(trained, tmp_path, features):
    def other(document):
        for run in document["features"]["runs"]:
            run["fingerprint"] = "0" * 64

    folder = changed_document(trained[0], tmp_path / "head", other)
    with pytest.raises((IncompatibleError, BadRequestError, NotCommittedError), match=r"fingerprint|000000"):
        evaluate(EvaluateConfig(head=folder, store=str(features), device="cpu"))


@pytest.fixture
def discs(tmp_path):
    """New pictures of what the head knows, one of another size, and one that is broken."""
    folder = tmp_path / "new"
    folder.mkdir()
    y, x = np.mgrid[:64, :64]
    for name, place in (("a.png", 20), ("b.png", 40)):
        disc = (y - place) ** 2 + (x - place) ** 2 < 16**2
        values = np.where(disc[..., None], [210, 120, 40], [60, 90, 160])
        Image.fromarray(values.astype(np.uint8)).resize((96, 80) if name == "b.png" else (64, 64)).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_what_is_missing_is_extracted_once(trained, discs, store, tmp_path):
    def use(out, **changes):
        return predict(
            PredictConfig(head=trained[0], images=(discs,), store=store, out=tmp_path / out, device="cpu", **changes)
        )

    with pytest.raises(NotCommittedError, match="features of 3 of 3 images are missing") as refused:
        use("none", extract=False)
    assert "--no-extract" in refused.value.hint
    first = use("one")
    assert first.extracted > 0
    assert list(first.failed) == ["broken.png"]
    again = use("two")
    assert again.predictions["images"][0]["classes"] == first.predictions["images"][0]["classes"]
    assert again.extracted == 2  # the broken one is tried again, in both runs
    for one in first.predictions["images"]:
        size = pixels(discs / one["key"]).shape[:2]
        labels = pixels(one["files"]["labels"])
        assert labels.shape == size
        assert set(np.unique(labels)) <= {0, 1}
        shares = {first.predictions["classes"][n]: (labels == n).mean() for n in np.unique(labels)}
        assert one["classes"].keys() == shares.keys()
        assert pixels(one["files"]["overlay"]).shape == (*size, 3)
        assert pixels(one["files"]["uncertainty"]).dtype == np.uint8
        np.testing.assert_array_equal(labels, pixels(one["files"]["labels"].replace("one", "two")))
    disc = pixels(discs / "a.png")[..., 0] > 127
    labels = pixels(tmp_path / "one" / "a.png.labels.png")
    assert labels[disc].mean() > labels[~disc].mean() + 0.3


def test_single_files_are_extracted_alone(trained, discs, store, tmp_path):
    report = predict(
        PredictConfig(head=trained[0], images=(discs / "a.png",), store=store, out=tmp_path / "p", device="cpu")
    )
    assert [one["key"] for one in report.predictions["images"]] == ["a.png"]
    assert report.extracted == 2


def test_without_images_it_is_the_data_set_s_own_test_images(trained, store, tmp_path):
    report = predict(PredictConfig(head=trained[0], store=store, out=tmp_path / "p", device="cpu", extract=False))
    assert [one["key"] for one in report.predictions["images"]] == ["test/5.png", "test/6.png", "test/7.png"]
    assert (tmp_path / "p" / "test" / "5.png.labels.png").exists()


@pytest.mark.parametrize(
    ("images", "message"), [(["nowhere"], "nowhere does not exist"), ([".", "."], "a folder among others")]
)
def test_images_that_are_none_are_refused(trained, tmp_path, images, message):
    with pytest.raises(BadRequestError, match=message):
        predict(PredictConfig(head=trained[0], images=tuple(tmp_path / name for name in images), device="cpu"))


def test_another_model_s_features_are_refused_with_the_difference(trained, discs, tmp_path):
    def other(document):
        for recipe in document["extra"]["recipes"]:
            recipe["weights_digest"] = "f" * 64

    folder = changed_document(trained[0], tmp_path / "head", other)
    with pytest.raises(IncompatibleError, match=r"weights_digest=[0-9a-f]{12} instead of weights_digest=ffffffffffff"):
        predict(PredictConfig(head=folder, images=(discs,), store=str(tmp_path / "s.zarr"), device="cpu"))

"""Segmentation of whole maps with UPerNet, as train-head, evaluate and predict run it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from featstore.errors import BadRequestError
from featstore.heads import load_head
from featstore.heads.upernet import UPerNetHead
from featstore.pipelines.evaluate import EvaluateConfig, evaluate
from featstore.pipelines.predict import PredictConfig, predict
from featstore.pipelines.progress import Silent
from featstore.pipelines.reading import BucketConfig, open_bucket
from featstore.pipelines.tasks import segmentation
from featstore.pipelines.train_head import TrainHeadConfig, train_head

pytestmark = pytest.mark.usefixtures("tiny")

LAYERS = "up-level2-upsampler-out,up-level3-repeat2-vit-out,attn-up-cross-2"


def train(labelled, features, **changes):
    bucket = BucketConfig(
        dataset=f"folder:{labelled}",
        techniques="basic,prompt",
        store=str(features),
        layers=changes.pop("layers", LAYERS),
    )
    values = {"head": "upernet", "splits": 1, "max_steps": 40, "device": "cpu"} | changes
    return train_head(TrainHeadConfig(bucket=bucket, **values))


@pytest.fixture(scope="module")
def trained(labelled, features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads") / "discs"
    return folder, train(labelled, features, out=folder, max_steps=120)


def test_it_learns_and_its_head_says_what_it_is(trained):
    folder, report = trained
    assert report.metrics["miou"].mean > 0.6  # all background: 0.4
    assert set(report.metrics) == {"miou", "accuracy", "macc"}
    head = load_head(folder)
    assert isinstance(head, UPerNetHead)
    assert [run.name for run in head.features.runs] == ["basic", "prompt"]
    assert list(head.features.beside_layers) == ["basic/attn-up-cross-2"]
    assert head.spec.classes == ("0", "1")
    weights = json.loads((folder / "head.json").read_text())["metrics"]["first_split"]["assigner_weights"]
    assert set(weights) == set(head.features.layers)
    assert np.array(weights["up-level2-upsampler-out"]).shape == (3, 2)


def test_a_saved_head_scores_what_it_scored_and_labels_new_images(trained, features, tmp_path):
    folder, report = trained
    found = evaluate(EvaluateConfig(head=folder, store=str(features), device="cpu"))
    assert found.summary == {name: metric.mean for name, metric in report.metrics.items()}
    said = predict(PredictConfig(head=folder, store=str(features), out=tmp_path, device="cpu", extract=False))
    assert [one["key"] for one in said.predictions["images"]] == ["test/5.png", "test/6.png", "test/7.png"]
    for one in said.predictions["images"]:
        assert 0 <= one["uncertainty"] <= np.log(2)
        with Image.open(one["files"]["labels"]) as image:
            labels = np.asarray(image)
        assert labels.shape == (64, 64)
        assert (labels == 1).mean() == pytest.approx(one["classes"]["1"])


def test_settings_reach_the_head(labelled, features, tmp_path):
    train(labelled, features, out=tmp_path, max_steps=2, per_channel=True, assigners=1)
    head = load_head(tmp_path)
    assert head.config.per_channel
    assert head.config.assigners == 1
    assert head.config.max_steps == 2


def test_a_pixel_head_may_weigh_each_channel(labelled, features, tmp_path):
    train(labelled, features, head="pixel", out=tmp_path, ensemble=1, max_steps=2, per_channel=True)
    assert load_head(tmp_path).config.per_channel


def test_reading_many_labels_shows_a_bar(labelled, features, monkeypatch):
    class Notes(Silent):
        def __init__(self):
            self.seen = []

        def start(self, title, total, unit):
            self.seen.append((title, total, unit))

        def advance(self, steps=1):
            self.seen.append(steps)

        def stop(self):
            self.seen.append("over")

    def seen():
        notes = Notes()
        labels = segmentation.read_labels(bucket, notes)
        assert sorted(labels) == [f"test/{n}.png" for n in (5, 6, 7)] + [f"train/{n}.png" for n in range(5)]
        return notes.seen

    bucket = open_bucket(BucketConfig(dataset=f"folder:{labelled}", techniques="basic", store=str(features)))
    assert seen() == []
    monkeypatch.setattr(segmentation, "_MANY_LABELS", 8)
    assert seen() == [("reading labels", 8, "images"), *[1] * 8, "over"]


def test_an_unknown_head_is_refused_with_the_nearest():
    with pytest.raises(BadRequestError, match=r"upernt.*upernet"):
        TrainHeadConfig(bucket=BucketConfig(dataset="toyhorse", techniques="basic"), head="upernt")

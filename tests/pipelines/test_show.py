from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from featstore import pictures
from featstore.errors import BadRequestError, NotCommittedError
from featstore.pipelines import show as module
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig
from featstore.pipelines.reading import BucketConfig, open_bucket
from featstore.pipelines.show import ShowConfig, show
from featstore.pipelines.show_panels import attention_panels, pca_of_runs
from featstore.techniques import SteeringOptions


@pytest.fixture
def bucket(labelled, features):
    return BucketConfig(dataset=f"folder:{labelled}", techniques="basic,prompt", store=str(features))


@pytest.mark.usefixtures("tiny")
def test_the_picture_has_a_column_for_each_thing_to_see(bucket, tmp_path, monkeypatch):
    drawn = {}

    def save_grid(path, panels, **rest):
        drawn.update(panels=panels, **rest)
        return genuine(path, panels, **rest)

    genuine = pictures.save_grid
    monkeypatch.setattr(pictures, "save_grid", save_grid)
    path = show(ShowConfig(bucket=bucket, keys=("test/6.png", "train/0.png"), out=tmp_path / "x.png"))
    titles = [panel.title for panel in drawn["panels"]]
    assert titles[:4] == ["input", "ground truth", "features: basic", "features: prompt"]
    assert titles[4].startswith("attention: ")
    assert drawn["row_titles"] == ["test/6.png", "train/0.png"]
    for panel in drawn["panels"]:
        assert len(panel.pictures) == 2
        for picture in panel.pictures:
            assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1, panel.title
    with Image.open(path) as image:
        assert image.width > 150 * len(titles)
        assert len(image.convert("RGB").getcolors(1 << 24)) > 500


def test_without_keys_the_first_images_that_are_there_are_shown(bucket, tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(module, "pca_of_runs", lambda _, r, **__: rows.extend(r) or {})
    monkeypatch.setattr(module, "attention_panels", lambda *_: [])
    show(ShowConfig(bucket=bucket, count=3, out=tmp_path / "x.png"))
    assert rows == [0, 1, 2]


def test_one_basis_for_all_runs(bucket):
    opened = open_bucket(bucket)
    both = pca_of_runs(opened, np.arange(8))
    assert list(both) == ["basic", "prompt"]
    # what is alike looks alike: a run beside itself gives the same pictures
    twice = pca_of_runs(
        open_bucket(BucketConfig(dataset=bucket.dataset, techniques="basic", store=bucket.store)), np.arange(8)
    )
    assert [picture.shape for picture in both["basic"]] == [picture.shape for picture in twice["basic"]]
    assert both["basic"][0].dtype == np.uint8


def test_attention_is_named_by_the_word_where_the_tokenizer_is_at_hand(bucket, labelled, features, tiny):
    one = BucketConfig(dataset=f"folder:{labelled}", techniques="prompt", store=str(features))
    opened = open_bucket(one)
    images = [opened.dataset.image("train/0.png")]
    titles = [panel.title for panel in attention_panels(opened, np.array([0]), images)]
    assert titles[0] == "attention: horse"


def test_attention_is_numbered_where_it_is_not(bucket, absent):
    absent("reference")
    opened = open_bucket(bucket)
    panels = attention_panels(opened, np.array([0]), [opened.dataset.image("train/0.png")])
    assert [panel.title for panel in panels] == ["attention: token 1", "attention: token 2", "attention: token 3"]


def test_an_unknown_image_and_missing_features_are_refused(bucket, photos, tmp_path, tiny):
    with pytest.raises(BadRequestError, match=r"'train/9\.png'"):
        show(ShowConfig(bucket=bucket, keys=("train/9.png",), out=tmp_path / "x.png"))
    store = str(tmp_path / "s.zarr")
    dataset = f"folder:{photos}"
    extract(ExtractConfig(dataset=dataset, techniques="basic", store=store, limit=2, device="cpu", model="reference"))
    few = BucketConfig(dataset=dataset, techniques="basic", store=store)
    with pytest.raises(NotCommittedError, match=r"'05\.png'") as caught:
        show(ShowConfig(bucket=few, keys=("00.png", "05.png"), out=tmp_path / "x.png"))
    assert "featstore extract" in caught.value.hint
    assert not (tmp_path / "x.png").exists()


@pytest.fixture
def drawn(monkeypatch):
    """What is given to `save_grid`; nothing is drawn."""
    given = {}

    def save_grid(path, panels, **rest):
        given.update(panels={panel.title: panel.pictures for panel in panels}, **rest)
        return path

    monkeypatch.setattr(pictures, "save_grid", save_grid)
    return given


@pytest.fixture
def steps(labelled, tiny, tmp_path):
    """A bucket of `basic` and `prompt` at t = 0, 50 and 501 of four images."""
    dataset, store = f"folder:{labelled}", str(tmp_path / "s.zarr")
    steering = SteeringOptions(prompt="a horse, high quality")
    config = {"dataset": dataset, "store": store, "model": "reference", "limit": 4, "device": "cpu"}
    extract(ExtractConfig(techniques="basic,prompt", timesteps=(0, 50, 501), steering=steering, **config))
    return BucketConfig(dataset=dataset, techniques="basic,prompt", timesteps=(50, 501), store=store)


def test_a_grid_of_techniques_by_timesteps(steps, drawn, tmp_path):
    show(ShowConfig(bucket=steps, kind="pca", count=2, out=tmp_path / "x.svg"))
    assert list(drawn["panels"]) == ["input", "t = 50", "t = 501"]
    keys = [title.rpartition(" ") for title in drawn["row_titles"]]
    assert [technique for _, _, technique in keys] == ["basic", "prompt"] * 2
    assert [picture is None for picture in drawn["panels"]["input"]] == [False, True, False, True]
    assert all(picture.dtype == np.uint8 for picture in drawn["panels"]["t = 501"])


def test_every_token_of_every_run(steps, drawn, tmp_path):
    show(ShowConfig(bucket=steps, kind="attention", count=1, out=tmp_path / "x.png"))
    titles = list(drawn["panels"])
    tokens = {run: [t for t in titles if t.startswith(f"{run}: ")] for run in ("basic t50", "basic t501", "prompt t50")}
    assert 2 <= len(tokens["basic t50"]) == len(tokens["basic t501"]) < len(tokens["prompt t50"])
    assert not [title for title in titles if title.endswith(": ,")]


def test_content_shift_is_nothing_for_the_reference_itself_and_grows(steps, drawn, tmp_path):
    both = dataclasses.replace(steps, techniques="basic", timesteps=(0, 50, 501))
    show(ShowConfig(bucket=both, kind="shift", count=2, out=tmp_path / "x.png"))
    shifts = {title.partition(":")[0]: float(title.partition(": ")[2]) for title in list(drawn["panels"])[1:]}
    assert shifts["basic t0"] == 0 < shifts["basic t50"] < shifts["basic t501"]
    darkest = drawn["panels"]["basic t0: 0.00"][0]
    assert len(np.unique(darkest.reshape(-1, 3), axis=0)) == 1


def test_without_features_at_zero_the_command_that_makes_them_is_said(bucket, tmp_path, tiny):
    with pytest.raises(NotCommittedError, match="t = 0") as caught:
        show(ShowConfig(bucket=bucket, kind="shift", out=tmp_path / "x.png"))
    assert "--techniques basic --timesteps 0" in caught.value.hint
    assert not (tmp_path / "x.png").exists()

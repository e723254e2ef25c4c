from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from featstore.errors import BadRequestError, NotCommittedError
from featstore.heads import load_head
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig
from featstore.pipelines.progress import Silent
from featstore.pipelines.reading import BucketConfig
from featstore.pipelines.train_head import TrainHeadConfig, train_head

FINE = "up-level3-repeat2-vit-out"


class Notes(Silent):
    def __init__(self):
        self.notes, self.started = [], []

    def note(self, text):
        self.notes.append(text)

    def start(self, title, total, unit):
        self.started.append((title, total, unit))


@pytest.fixture
def config(labelled, features):
    def make(**changes):
        bucket = BucketConfig(
            dataset=changes.pop("dataset", f"folder:{labelled}"),
            techniques=changes.pop("techniques", "basic"),
            store=changes.pop("store", str(features)),
            layers=changes.pop("layers", None),
        )
        values = {"ensemble": 2, "splits": 1, "max_steps": 600, "device": "cpu"}
        return TrainHeadConfig(bucket=bucket, **(values | changes))

    return make


@pytest.fixture
def own(labelled, tmp_path, tiny):
    """A data set of one's own, to be changed, and its store."""
    folder = shutil.copytree(labelled, tmp_path / "discs")
    store = str(tmp_path / "own.zarr")

    def again():
        return extract(
            ExtractConfig(dataset=f"folder:{folder}", techniques="basic", store=store, model="reference", device="cpu")
        )

    again()
    return folder, {"dataset": f"folder:{folder}", "store": store}, again


def test_a_head_learns_and_says_so(config, tmp_path):
    progress = Notes()
    report = train_head(config(techniques="basic,prompt", layers=FINE, out=tmp_path / "head"), progress)
    assert report.metrics["miou"].mean > 0.6  # all background: 0.4
    assert progress.started == [("training, split 1 of 1", 600, "steps")]
    value = report.to_json()
    assert [one["class"] for one in value["per_class"]] == ["0", "1"]
    document = json.loads((tmp_path / "head" / "head.json").read_text())
    assert document["facts"]["classes"] == ["0", "1"]
    head = load_head(tmp_path / "head")
    assert [run.name for run in head.features.runs] == ["basic", "prompt"]
    chosen = document["metrics"]["first_split"]["assigner_weights"]
    assert set(chosen) == {"all pixels", "0", "1"}
    assert all(sum(row) == pytest.approx(1, abs=1e-5) for rows in chosen.values() for row in rows)
    with Image.open(tmp_path / "head" / "assigners.png") as picture:
        assert picture.width > 500
    result = report.results[0]
    assert result.test_rows.tolist() == [0, 1, 2]  # test/5.png .. test/7.png stand first in the table
    assert result.weights.shape == (2, 3, 2)


def test_the_first_split_is_the_set_s_own_and_the_others_are_drawn(config):
    report = train_head(config(splits=3, max_steps=20))
    assert len(report.metrics["miou"].splits) == 3
    tested = [result.test_rows.tolist() for result in report.results]
    assert tested[0] == [0, 1, 2]
    assert all(len(rows) == 3 for rows in tested)
    assert report.metrics["miou"].std == pytest.approx(np.std(report.metrics["miou"].splits, ddof=1))


def test_the_same_seed_gives_the_same_head(config):
    one, two, other = (train_head(config(max_steps=20, seed=seed)) for seed in (0, 0, 1))
    assert (one.results[0].predictions == two.results[0].predictions).all()
    assert one.results[0].log.losses == two.results[0].log.losses
    assert one.results[0].log.losses != other.results[0].log.losses


def test_stale_rows_are_refused(config, own):
    folder, where, again = own
    Image.new("RGB", (64, 64)).save(folder / "train" / "2.png")
    with pytest.raises(NotCommittedError, match=r"1 of 8 .*'train/2.png'") as caught:
        train_head(config(**where))
    assert "featstore extract" in caught.value.hint
    again()
    assert train_head(config(max_steps=5, **where)).metrics["miou"].mean >= 0


def test_images_that_are_new_or_broken_are_left_out_only_if_asked(config, own):
    folder, where, again = own
    (folder / "train" / "0.png").write_bytes(b"no picture any more")
    Image.new("RGB", (64, 64)).save(folder / "train" / "new.png")
    np.save(folder / "train" / "new.npy", np.ones((64, 64), np.uint8))
    with pytest.raises(NotCommittedError, match="2 of 9 labelled images"):
        train_head(config(**where))
    assert list(again().failed) == ["train/0.png"]
    with pytest.raises(NotCommittedError, match="1 of 9 labelled images"):
        train_head(config(**where))
    progress = Notes()
    report = train_head(config(max_steps=5, skip_missing=True, **where), progress)
    assert "'train/0.png'" in progress.notes[0]
    assert report.results[0].metrics["train_images"] == 5
    assert report.results[0].metrics["test_images"] == 3


def test_an_unlabelled_broken_image_does_not_matter(config, own):
    folder, where, again = own
    (folder / "train" / "zzz.png").write_text("no picture")
    assert list(again().failed) == ["train/zzz.png"]
    assert train_head(config(max_steps=5, **where)).metrics["miou"].mean >= 0


def test_labels_that_cannot_be_read_are_left_out_with_a_note(config, own):
    folder, where, _ = own
    mask = folder / "train" / "3.npy"
    noise = np.random.default_rng(0).integers(0, 2, (64, 64), np.uint8)
    Image.fromarray(noise).save(folder / "train" / "3_mask.png")
    mask.unlink()
    mask = folder / "train" / "3_mask.png"
    mask.write_bytes(mask.read_bytes()[:-200])  # its size can still be read
    progress = Notes()
    report = train_head(config(max_steps=5, **where), progress)
    assert "'train/3.png'" in progress.notes[0]
    assert report.results[0].metrics["train_images"] == 4


def test_a_data_set_without_labels_or_splits_is_refused(config, photos, own, tmp_path):
    store = str(tmp_path / "photos.zarr")
    wanted = ExtractConfig(dataset=f"folder:{photos}", techniques="basic", store=store, model="reference", device="cpu")
    extract(wanted)
    with pytest.raises(BadRequestError, match="'photos' has no labels") as caught:
        train_head(config(dataset=f"folder:{photos}", store=store))
    assert "masks/" in caught.value.hint
    for number in range(10):
        np.save(photos / f"{number:02d}.npy", np.zeros((60, 80), np.uint8))
    with pytest.raises(BadRequestError, match="0 training and 0 test"):
        train_head(config(dataset=f"folder:{photos}", store=store))


def test_masks_are_brought_to_the_size_of_the_model_s_input(config, labelled, tmp_path, tiny):
    folder = tmp_path / "large"
    for path in sorted(labelled.rglob("*.png")):
        target = folder / path.relative_to(labelled)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((100, 130)).save(target)
        mask = Image.fromarray(np.load(path.with_suffix(".npy"))).resize((100, 130), Image.Resampling.NEAREST)
        np.save(target.with_suffix(".npy"), np.asarray(mask))
    store = str(tmp_path / "large.zarr")
    wanted = ExtractConfig(dataset=f"folder:{folder}", techniques="basic", store=store, model="reference", device="cpu")
    extract(wanted)
    report = train_head(config(dataset=f"folder:{folder}", store=store, layers=FINE))
    assert report.results[0].predictions.shape == (3, 64, 64)
    assert report.metrics["miou"].mean > 0.6


def test_an_unknown_task_is_refused(config):
    with pytest.raises(BadRequestError, match="segmentation"):
        config(task="segmantation")

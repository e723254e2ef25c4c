"""The pipeline as a whole: what is computed, what is reused, and that bytes depend on nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import featstore
from featstore.errors import BadRequestError, NotFoundError, StorageError
from featstore.pipelines.extract import execute, extract
from featstore.pipelines.plan import ExtractConfig, make_plan
from featstore.pipelines.progress import Silent
from featstore.techniques import SteeringOptions

pytestmark = pytest.mark.usefixtures("tiny")


def maps(config, technique="basic", keys=None):
    """Every layer's stored rows by image key."""
    stored = featstore.open(config.store).dataset("photos")
    run = stored.run(technique)
    keys = keys or [key for key, there in zip(stored.samples.keys, run.valid(list(run.layers)), strict=True) if there]
    rows = [stored.row_of[key] for key in keys]
    arrays = {layer: run.numpy(layer, rows) for layer in run.layers}
    return {key: {layer: array[i].tobytes() for layer, array in arrays.items()} for i, key in enumerate(keys)}


def test_everything_is_computed_once(config, lora):
    first = extract(config(techniques="basic,controlnet"))
    assert [outcome.computed for outcome in first.outcomes] == [10, 10]
    again = extract(config(techniques=f"basic,controlnet,{lora}"))
    assert [outcome.computed for outcome in again.outcomes] == [0, 0, 10]
    report = again.to_json()
    assert [run["reused"] for run in report["runs"]] == [10, 10, 0]
    assert report["runs"][2]["layers"]["attn-up-cross-2"] == [77, 8, 8]
    sizes = [int(np.prod(shape)) * 2 for shape in report["runs"][2]["layers"].values()]
    assert report["runs"][2]["bytes"] == 10 * sum(sizes)


def test_a_finished_extraction_imports_no_torch(config):
    wanted = config()
    extract(wanted)
    code = (
        "import sys\n"
        "from featstore.pipelines.extract import extract\n"
        "from featstore.pipelines.plan import ExtractConfig\n"
        f"report = extract(ExtractConfig(dataset={wanted.dataset!r}, techniques='basic', store={wanted.store!r},"
        " model='reference', device='cpu'))\n"
        "assert report.passes == 0, report.passes\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'zarr', 'dask'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bytes_do_not_depend_on_order_failures_or_other_techniques(config, photos, lora, tmp_path):
    plain = config()
    extract(plain)
    expected = maps(plain)
    assert len(expected) == 10

    # Other names: another order, other neighbours in each batch; and two files that cannot be read.
    shuffled = tmp_path / "again" / "photos"
    shuffled.mkdir(parents=True)
    for index in range(10):
        shutil.copy(photos / f"{index:02d}.png", shuffled / f"{(7 * index + 3) % 10:02d}-was-{index:02d}.png")
    (shuffled / "03-broken.png").write_bytes(b"no picture")
    (shuffled / "00-broken.jpg").write_bytes((photos / "00.png").read_bytes()[:300])
    other = config(
        dataset=f"folder:{shuffled}",
        techniques=f"{lora},basic,controlnet+prompt",
        steering=SteeringOptions(prompt="a cat"),
        store=str(tmp_path / "other"),
    )
    report = extract(other)
    assert set(report.failed) == {"03-broken.png", "00-broken.jpg"}
    found = maps(other)
    assert {key.partition("-was-")[2]: value for key, value in found.items()} == expected


def test_batch_sizes_agree_to_a_thousandth(config, tmp_path):
    one, sixteen = (
        config(batch_size=1, store=str(tmp_path / "one")),
        config(batch_size=16, store=str(tmp_path / "sixteen")),
    )
    runs = []
    for wanted in (one, sixteen):
        extract(wanted)
        runs.append(featstore.open(wanted.store).dataset("photos").run("basic"))
    assert [run.batch_size for run in runs] == [1, 16]
    for layer in runs[0].layers:
        a, b = (run.numpy(layer, range(10)).astype(np.float64).reshape(10, -1) for run in runs)
        assert (np.linalg.norm(a - b, axis=1) <= 1e-3 * np.linalg.norm(a, axis=1)).all(), layer


def test_a_run_keeps_its_batch_shape(config):
    extract(config(limit=5, batch_size=4))
    extract(config(batch_size=16))
    assert featstore.open(config().store).dataset("photos").run("basic").batch_size == 4


def test_more_layers_are_added_and_the_others_left_alone(config):
    extract(config())
    before = maps(config())
    report = extract(config(layers="legacy,mid-repeat0-res-out"))
    assert report.outcomes[0].computed == 10
    after = maps(config())
    for key, layers in before.items():
        assert {layer: after[key][layer] for layer in layers} == layers
        assert "mid-repeat0-res-out" in after[key]


def test_a_changed_image_is_computed_anew_and_a_new_one_added(config, photos):
    extract(config())
    before = maps(config())
    Image.new("RGB", (70, 70), (200, 30, 30)).save(photos / "04.png")
    Image.new("RGB", (70, 70), (30, 200, 30)).save(photos / "10.png")
    planned = make_plan(config())
    assert planned.passes_todo == 2
    extract(config())
    after = maps(config())
    assert after["04.png"] != before["04.png"]
    assert "10.png" in after
    assert all(after[key] == before[key] for key in before if key != "04.png")


def test_a_broken_image_is_tried_again(config, photos):
    whole = (photos / "05.png").read_bytes()
    (photos / "05.png").write_bytes(whole[:100])
    report = extract(config())
    assert list(report.failed) == ["05.png"]
    assert report.to_json()["runs"][0]["failed"][0]["key"] == "05.png"
    assert extract(config()).passes == 0
    (photos / "05.png").write_bytes(whole)
    assert extract(config()).passes == 1


def test_features_that_are_not_finite_are_reported_and_the_rest_is_stored(config, monkeypatch):
    from featstore.extraction.forward import Extractor

    genuine = Extractor.encode

    def poisoned(self, images):
        latents = genuine(self, images).clone()
        latents[2] = float("nan")
        return latents

    monkeypatch.setattr(Extractor, "encode", poisoned)
    report = extract(config())
    assert list(report.failed) == ["02.png"]
    assert "NaN" in report.failed["02.png"]
    assert report.passes == 9
    monkeypatch.setattr(Extractor, "encode", genuine)
    assert extract(config()).passes == 1


def test_the_plan_says_what_it_takes(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    planned = make_plan(config(limit=6))
    value = planned.to_json()
    assert value["runs"][0]["compute"] == 6
    shapes = value["runs"][0]["layers"].values()
    assert value["bytes"] == 6 * 2 * sum(int(np.prod(shape)) for shape in shapes)
    assert value["seconds"] is None
    extract(config(limit=6))
    assert make_plan(config()).seconds > 0


def test_a_disk_that_is_too_small_is_refused_before_anything_starts(config, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10, 9, 1000))
    with pytest.raises(StorageError, match="GB free") as caught:
        make_plan(config())
    assert caught.value.exit_code == 2


def test_a_failing_disk_stops_the_run_with_the_reason(config, monkeypatch):
    from featstore.store.run import Run

    def full(self, block, rows, maps):
        raise StorageError("no space left", hint="free some")

    planned = make_plan(config())
    monkeypatch.setattr(Run, "write_block", full)
    with pytest.raises(StorageError, match="no space"):
        execute(planned, Silent())
    monkeypatch.undo()


def test_an_interruption_leaves_what_is_committed(config, lora):
    class Impatient(Silent):
        def advance(self, steps=1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(make_plan(config(techniques=f"basic,{lora}")), Impatient())
    assert extract(config(techniques=f"basic,{lora}")).passes <= 20
    whole = maps(config(), lora)
    assert len(whole) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "toyhorses"}, "toyhorse"),
        ({"model": "sd99"}, "sd99"),
        ({"techniques": "contrlnet"}, "contrlnet"),
        ({"techniques": "basic,,lora"}, "techniques|technique"),
        ({"layers": "up-level9-upsampler-out"}, "up-level9-upsampler-out"),
        ({"timesteps": (1000,)}, "1000"),
        ({"timesteps": (-1,)}, "-1"),
        ({"image_size_px": 65}, "65"),
        ({"split": "dev"}, "dev"),
        ({"limit": 0}, "--limit 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"precision": "float8"}, "float8"),
        ({"device": "tpu"}, "tpu"),
        ({"techniques": "prompt"}, "prompt"),
    ],
)
def test_bad_requests_name_the_value_before_any_weight_loads(config, changes, message, monkeypatch):
    from featstore.models.source import ModelSource

    def never(self, *_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(ModelSource, "load", never)
    with pytest.raises((BadRequestError, NotFoundError), match=message):
        make_plan(config(**changes))


def test_a_store_that_cannot_be_written_is_a_bad_request(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError) as caught:
        extract(config(store=str(tmp_path / "file" / "features.zarr")))
    assert caught.value.exit_code == 2


def test_another_data_set_under_the_same_name_is_refused(config, photos, tmp_path):
    extract(config(limit=2))
    stranger = tmp_path / "elsewhere" / "photos"
    stranger.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(stranger / "stranger.png")
    with pytest.raises(BadRequestError, match="photos"):
        extract(config(dataset=f"folder:{stranger}"))
    assert extract(config(dataset=f"folder:{stranger}", dataset_name="strangers")).passes == 1


def test_toyhorse_brings_its_own_model_size_and_prompt(tmp_path):
    wanted = ExtractConfig(dataset="toyhorse", techniques="prompt", store=str(tmp_path / "s"), limit=3, device="cpu")
    planned = make_plan(wanted)
    recipe = planned.runs[0].recipe
    assert (recipe.model, recipe.height_px) == ("reference", 64)
    assert recipe.parameters["prompt"].startswith("a horse, high quality")
    assert extract(wanted).passes == 3

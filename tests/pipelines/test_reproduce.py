"""An experiment from end to end, small; nothing is done twice."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from featstore.errors import BadRequestError
from featstore.heads import read_head_json
from featstore.pipelines import recipe_file
from featstore.pipelines.reproduce import ReproduceConfig, make_plans, reproduce

DISCS = """
title = "Discs"
source = "a test"
dataset = "folder:{folder}"
model = "reference"

[extract.maps]
techniques = "basic,prompt"
prompt = "a horse, high quality"
layers = "up-level3-repeat2-vit-out"

[extract.attention]
techniques = "basic"
denoise_from = 60
layers = "attn-up-cross-2"

[head.basic]
techniques = "basic"
beside = []
splits = 2

[head."a / b"]
beside = [{{ from = "attention" }}]
assigners = 2
reported = {{ miou = 0.5 }}
note = "other discs"
"""

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def config(labelled, tmp_path):
    def make(text=DISCS, **changes):
        recipe = recipe_file.parse("discs", text.format(folder=labelled))
        values = {
            "recipe": recipe,
            "store": str(tmp_path / "s.zarr"),
            "out": tmp_path / "out",
            "ensemble": 2,
            "max_steps": 30,
            "device": "cpu",
        }
        return ReproduceConfig(**(values | changes))

    return make


def test_an_experiment_is_run_once(config, tmp_path):
    first = reproduce(config())
    assert first.passes == 3 * 8
    assert [(one.name, one.reused) for one in first.outcomes] == [("basic", False), ("a / b", False)]
    assert len(first.outcomes[0].metrics["miou"].splits) == 2
    json.dumps(first.to_json(), allow_nan=False)
    both = read_head_json(tmp_path / "out" / "discs" / "a _ b")
    assert [run["name"] for run in both["features"]["runs"]] == ["basic", "prompt"]
    (beside,) = both["features"]["beside"]
    assert [layer[0] for layer in beside["layers"]] == ["attn-up-cross-2"]
    # The run beside is the denoised one, and not the run of the same technique in the bucket.
    assert beside["run"]["fingerprint"] not in {run["fingerprint"] for run in both["features"]["runs"]}
    assert both["extra"]["beside_recipes"][0]["denoise_from"] == 60
    assert read_head_json(tmp_path / "out" / "discs" / "basic")["features"]["beside"] == []

    again = reproduce(config())
    assert again.passes == 0
    assert [one.reused for one in again.outcomes] == [True, True]
    assert [one.metrics for one in again.outcomes] == [one.metrics for one in first.outcomes]

    other = reproduce(config(heads=("basic",), splits=1))
    assert [(one.name, one.reused, len(one.metrics["miou"].splits)) for one in other.outcomes] == [("basic", False, 1)]
    shutil.rmtree(tmp_path / "out")
    assert not any(one.reused for one in reproduce(config()).outcomes)


def test_only_what_the_chosen_heads_read_is_planned(config):
    assert list(make_plans(config(heads=("basic",)))) == ["maps"]
    assert list(make_plans(config())) == ["maps", "attention"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('techniques = "basic"\nbeside', 'techniques = "controlnet"\nbeside', r"head.basic\]: unknown technique"),
        ("splits = 2", "timesteps = [10]", r"timestep 10 is none of \[50\]"),
    ],
)
def test_a_head_reads_what_is_extracted_for_it(config, old, new, message):
    assert old in DISCS
    with pytest.raises(BadRequestError, match=message):
        make_plans(config(DISCS.replace(old, new)))


def test_an_unknown_head_is_refused(config):
    with pytest.raises(BadRequestError, match=r"unknown head 'basik'.*basic"):
        config(heads=("basik",))


def test_a_head_is_trained_anew_when_an_image_changes(config, labelled, tmp_path):
    folder = shutil.copytree(labelled, tmp_path / "own")
    recipe = recipe_file.parse("own", DISCS.format(folder=folder))
    mine = dataclasses.replace(config(), recipe=recipe, heads=("basic",), splits=1)
    reproduce(mine)
    assert reproduce(mine).outcomes[0].reused
    shutil.copy(folder / "train" / "0.png", folder / "train" / "1.png")
    changed = reproduce(mine)
    assert changed.passes == 2  # of basic and of prompt
    assert not changed.outcomes[0].reused

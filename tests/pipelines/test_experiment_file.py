"""Experiments as files: settings written out, comparisons found, mistakes named with their place."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from featstore.errors import BadRequestError
from featstore.pipelines.experiment import file
from featstore.pipelines.experiment.findings import FINDINGS

AXES = """
title = "Discs"
dataset = "toyhorse"
model = "reference"

[extract]
layers = "up-level2-upsampler-out"
guidance_scale = 3

[head]
splits = 6
ensemble = 3

[axes]
extract.techniques = ["basic", "prompt:low"]
extract.timesteps = [51, [51, 501]]
head.max_steps = { "1x" = 2000, "2x" = 4000 }

[[compare]]
along = "techniques"
to = "basic"
"""
LISTED = """
title = "Discs"
dataset = "toyhorse"

[extract]
timesteps = [51]

[[setting]]
name = "one"
extract = { techniques = "basic" }

[[setting]]
name = "both"
dataset = "toyhorse-degraded"
extract = { techniques = "basic,prompt", timesteps = [201] }
head = { assigners = 2 }

[axes]
seed = [0, 1]

[[compare]]
along = "setting"
to = "one"

[[compare]]
a = "both, seed 0"
b = "one, seed 1"
metric = "accuracy"
"""


def test_axes_are_multiplied():
    experiment = file.parse("discs", AXES)
    assert experiment.axes == ("techniques", "timesteps", "max_steps")
    assert len(experiment.settings) == 8
    first, last = experiment.settings[0], experiment.settings[-1]
    assert first.name == "basic, t51, max steps 1x"
    assert last.name == "prompt:low, t51+501, max steps 2x"
    assert last.axes == {"techniques": "prompt:low", "timesteps": "51,501", "max_steps": "2x"}
    assert (last.dataset, last.seed, experiment.model) == ("toyhorse", None, "reference")
    assert (first.extract.timesteps, last.extract.timesteps) == ((51,), (51, 501))
    assert (last.extract.techniques, last.extract.layers) == ("prompt:low", "up-level2-upsampler-out")
    assert last.extract.guidance_scale == 3.0
    assert (last.head.max_steps, last.head.splits, last.head.ensemble) == (4000, 6, 3)


def test_settings_are_listed_and_multiplied():
    experiment = file.parse("discs", LISTED)
    assert [one.name for one in experiment.settings] == ["one, seed 0", "one, seed 1", "both, seed 0", "both, seed 1"]
    both = experiment.settings[2]
    assert (both.dataset, both.seed, both.head.assigners) == ("toyhorse-degraded", 0, 2)
    assert (both.extract.techniques, both.extract.timesteps) == ("basic,prompt", (201,))
    assert experiment.settings[0].extract.timesteps == (51,)


def test_an_axis_is_compared_at_the_same_place_on_all_others():
    found = [(a.name, b.name, metric) for a, b, metric in file.parse("discs", AXES).pairs()]
    assert found == [
        (f"prompt:low, {rest}", f"basic, {rest}", None)
        for rest in ("t51, max steps 1x", "t51, max steps 2x", "t51+501, max steps 1x", "t51+501, max steps 2x")
    ]
    assert [(a.name, b.name, metric) for a, b, metric in file.parse("discs", LISTED).pairs()] == [
        ("both, seed 0", "one, seed 0", None),
        ("both, seed 1", "one, seed 1", None),
        ("both, seed 0", "one, seed 1", "accuracy"),
    ]


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (AXES, 'title = "Discs"', "", "discs lacks title"),
        (AXES, 'dataset = "toyhorse"', "", "has no dataset"),
        (AXES, "guidance_scale", "guidence_scale", r"extract: unknown key 'guidence_scale'.*guidance_scale"),
        (AXES, "ensemble", "ensembel", r"head: unknown key 'ensembel'.*ensemble"),
        (AXES, "splits = 6", "timesteps = [1]", r"unknown key 'head.timesteps'"),
        (AXES, "extract.techniques", "extrakt.techniques", r"\[axes\]: unknown key 'extrakt'.*extract"),
        (AXES, "extract.techniques", "extract.technique", r"unknown key 'technique'.*techniques"),
        (AXES, '["basic", "prompt:low"]', '["basic", "basic"]', r"extract.techniques: basic is listed twice"),
        (AXES, '["basic", "prompt:low"]', '"basic"', "neither a list of values nor a table"),
        (AXES, '["basic", "prompt:low"]', "[1]", "techniques: 1 is not of type"),
        (AXES, 'along = "techniques"', 'along = "technique"', r"compare 1: unknown axis 'technique'.*techniques"),
        (AXES, 'to = "basic"', 'to = "basik"', r"compare 1: unknown place on axis 'techniques' 'basik'.*basic"),
        (AXES, 'to = "basic"', "", "says neither along and to, nor a and b"),
        (AXES, 'to = "basic"', 'to = "basic"\nmetric = "iou"', r"compare 1: unknown metric 'iou'.*miou"),
        (AXES, "splits = 6", 'task = "segmentatoin"', r"unknown task 'segmentatoin'.*segmentation"),
        (AXES, "splits = 6", 'head = "convv"', r"unknown head 'convv'"),
        (LISTED, 'name = "both"', 'name = "one"', "two settings are called 'one, seed 0'"),
        (LISTED, 'name = "both"', "", "setting 2 has no name"),
        (LISTED, 'name = "both"', 'name = "both"\ntechnique = "x"', r"setting 2: unknown key 'technique'"),
        (LISTED, "seed = [0, 1]", "seed = [-1]", "seed -1 is no whole number"),
        (LISTED, 'a = "both, seed 0"', 'a = "both, sead 0"', r"unknown setting 'both, sead 0'.*both, seed 0"),
        (LISTED, "[axes]", "[axis]", r"unknown key 'axis'.*axes"),
    ],
)
def test_mistakes_are_named(text, old, new, message):
    assert old in text
    with pytest.raises(BadRequestError, match=message):
        file.parse("discs", text.replace(old, new, 1))


def test_an_experiment_has_settings_and_a_score_is_of_one_run():
    with pytest.raises(BadRequestError, match=r"no \[axes\] and no \[\[setting\]\]"):
        file.parse("x", 'title = "x"\ndataset = "toyhorse"')
    with pytest.raises(BadRequestError, match="no TOML"):
        file.parse("x", "title =")
    with pytest.raises(BadRequestError, match=r"\[correlate\]: setting 'basic, t51\+501.*several runs"):
        file.parse("x", AXES + '\n[correlate]\nto = "basic"\n')


def test_files_are_found_by_name_or_path(tmp_path):
    with pytest.raises(BadRequestError, match=r"unknown experiment 'promts'.*prompts"):
        file.load("promts")
    (tmp_path / "mine.toml").write_text(AXES)
    assert file.load(str(tmp_path / "mine.toml")).name == "mine"
    with pytest.raises(BadRequestError, match="cannot read"):
        file.load(str(tmp_path / "nothing.toml"))


def test_the_findings_ask_what_they_should():
    assert sorted(FINDINGS) == file.names()
    asked = {name: file.load(name) for name in FINDINGS}
    trained = {(one.head.ensemble, one.head.splits) for each in asked.values() for one in each.settings}
    assert trained == {(3, 6)}, "settings of all experiments are trained alike"
    steps = {name: {one.head.max_steps for one in each.settings} for name, each in asked.items()}
    assert steps.pop("assigners") == {2000, 4000}
    assert all(one == {2000} for one in steps.values())
    assert len({one.extract.layers for each in asked.values() for one in each.settings}) == 1
    assert {one.axes["timesteps"] for one in asked["techniques"].settings} == {"51", "201", "501"}
    assert {one.axes["assigners"] for one in asked["assigners"].settings} == {"1", "2", "3", "4"}
    assert {one.dataset for one in asked["prompts"].settings} == {"toyhorse", "toyhorse-degraded"}
    gains = [one for one in asked["gate"].settings if one.axes["techniques"] != "basic"]
    assert len(gains) >= 15
    assert all(each.compare or each.correlate for each in asked.values())


def test_the_files_are_part_of_the_package():
    root = Path(file.__file__).resolve().parents[2]
    packaged = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "experiments/*.toml" in packaged["package-data"]["featstore.pipelines"]
    assert "featstore.pipelines.experiment" in packaged["packages"]

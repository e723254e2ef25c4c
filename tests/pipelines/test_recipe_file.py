"""Experiments as files: those that come with featstore parse, and mistakes are named."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import featstore.datasets
import featstore.models
import featstore.techniques
from featstore.errors import BadRequestError
from featstore.pipelines import recipe_file
from featstore.pipelines.plan import ExtractConfig

GOOD = """
title = "Discs"
source = "a test"
dataset = "toyhorse"

[extract.maps]
techniques = "basic,prompt"
timesteps = [50, 100]
guidance_scale = 3

[extract.attention]
techniques = "prompt"
denoise_from = 60

[head.one]
techniques = "basic"
reported = { miou = 1 }

[head.both]
from = "maps"
beside = [{ from = "attention", layers = "attn-up-cross-2" }]
splits = 2
"""


def test_a_file_is_what_it_says():
    recipe = recipe_file.parse("discs", GOOD)
    assert (recipe.name, recipe.title, recipe.dataset, recipe.model) == ("discs", "Discs", "toyhorse", None)
    assert recipe.extract["maps"] == recipe_file.Extraction(
        techniques="basic,prompt", timesteps=(50, 100), guidance_scale=3.0
    )
    assert recipe.head["one"].source == "maps"
    assert recipe.head["one"].reported == {"miou": 1.0}
    assert recipe.head["one"].beside is None
    assert recipe.head["both"].beside == (recipe_file.Concatenated(source="attention", layers="attn-up-cross-2"),)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "Discs"', "", "discs lacks title"),
        ('title = "Discs"', "title = 3", "title: 3 is not of type"),
        ("[head.one]", "[haed.one]", r"unknown key 'haed'.*head"),
        ("denoise_from = 60", "denoise_form = 60", r"\[extract.attention\]: unknown key 'denoise_form'.*denoise_from"),
        ("denoise_from = 60", "denoise_from = true", "denoise_from: True is not of type"),
        ("timesteps = [50, 100]", 'timesteps = ["50"]', "timesteps: '50' is not of type"),
        ("splits = 2", "splits = 2.5", "splits: 2.5 is not of type"),
        ('techniques = "prompt"', "", r"\[extract.attention\] lacks techniques"),
        ('from = "maps"', 'from = "map"', r"\[head.both\]: unknown extraction 'map'.*maps"),
        ('from = "maps"', 'source = "maps"', "unknown key 'source'"),
        ('from = "attention"', 'from = "atention"', "unknown extraction 'atention'.*attention"),
        ("splits = 2", 'task = "segmentaton"', "unknown task 'segmentaton'"),
        ("splits = 2", 'head = "pixl"', r"unknown head 'pixl'.*pixel"),
        ("miou = 1", "moiu = 1", r"reported: unknown metric 'moiu'.*miou"),
        ('dataset = "toyhorse"', "dataset = ", "no TOML"),
    ],
)
def test_a_mistake_is_named_with_its_place(old, new, message):
    assert old in GOOD
    with pytest.raises(BadRequestError, match=message):
        recipe_file.parse("discs", GOOD.replace(old, new, 1))


@pytest.mark.parametrize("table", ["extract", "head"])
def test_nothing_to_do_is_a_mistake(table):
    start = GOOD.index(f"[{table}.")
    end = GOOD.index("[head.") if table == "extract" else len(GOOD)
    with pytest.raises(BadRequestError, match=rf"no \[{table}.NAME\]"):
        recipe_file.parse("x", GOOD[:start] + GOOD[end:])


def test_names_are_looked_up_and_files_are_read(tmp_path):
    with pytest.raises(BadRequestError, match=r"unknown experiment 'horse12'.*horse21"):
        recipe_file.load("horse12")
    path = tmp_path / "discs.toml"
    path.write_text(GOOD)
    assert recipe_file.load(str(path)) == recipe_file.parse("discs", GOOD)
    with pytest.raises(BadRequestError, match="cannot read"):
        recipe_file.load(str(tmp_path / "nothing.toml"))


def test_there_is_one_for_each_task_of_the_paper():
    assert set(recipe_file.names()) >= {
        "ade20k", "bedroom28", "cifar10", "cityscapes", "horse21", "spair71k", "toyhorse"
    }  # fmt: skip
    tasks = {head.task for name in recipe_file.names() for head in recipe_file.load(name).head.values()}
    assert tasks == {"segmentation", "correspondence", "classification"}


@pytest.mark.parametrize("name", recipe_file.names())
def test_what_an_experiment_names_is_known(name):
    recipe = recipe_file.load(name)
    assert recipe.dataset in featstore.datasets.DATASETS
    described = featstore.models.describe(recipe.model)
    for stage in recipe.extract.values():
        assert featstore.techniques.parse(stage.techniques)
        described.expand_layers(stage.layers or described.default_layers)
        ExtractConfig(
            dataset=recipe.dataset,
            techniques=stage.techniques,
            timesteps=stage.timesteps,
            denoise_from=stage.denoise_from,
            precision=stage.precision,
            reduce=stage.reduce,
        )
    for head in recipe.head.values():
        assert all(0 < value < 1 for value in head.reported.values())


def test_no_figure_of_the_paper_is_missing_its_source():
    for name in recipe_file.names():
        recipe = recipe_file.load(name)
        assert any(head.reported for head in recipe.head.values()) == ("arXiv" in recipe.source)


def test_the_files_are_part_of_the_package():
    root = Path(recipe_file.__file__).resolve().parents[1]
    packaged = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "recipes/*.toml" in packaged["featstore.pipelines"]

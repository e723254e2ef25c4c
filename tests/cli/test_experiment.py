"""`featstore experiment` as people call it: the plan and what it saves, tables, JSON, refusals."""

from __future__ import annotations

import json

import pytest

TEXT = """
title = "Discs"
dataset = "folder:FOLDER"
model = "reference"

[extract]
layers = "up-level3-repeat2-vit-out"
prompt = "a horse, high quality"

[head]
ensemble = 2
splits = 3
max_steps = 20

[axes]
extract.techniques = ["basic", "prompt", "basic,prompt"]

[[compare]]
along = "techniques"
to = "basic"
"""

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def words(labelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "discs.toml").write_text(TEXT.replace("FOLDER", str(labelled)))
    return ("experiment", "discs.toml", "--store", tmp_path / "s.zarr", "--device", "cpu")


def test_the_plan_says_what_is_saved_and_nothing_is_done(run, run_json, words, tmp_path):
    shown = run(*words, "--dry-run").stdout
    assert "32 passes asked for, 16 made: 50 % saved" in shown
    assert "16 of them are still to be made" in shown
    assert "3 settings, 0 of them trained already" in shown
    assert "9 heads are still to be trained, time not known yet" in shown
    plan = run_json(*words, "--dry-run")
    assert (plan["passes_asked"], plan["passes_made"], plan["passes_todo"], plan["trainings"]) == (32, 16, 16, 9)
    assert plan["bytes"] > 0
    assert [one["name"] for one in plan["settings"]] == ["basic", "prompt", "basic,prompt"]
    assert not (tmp_path / "s.zarr").exists()
    assert not (tmp_path / "experiments").exists()


def test_it_is_run_and_read(run, run_json, words, tmp_path):
    done = run(*words)
    assert "32 passes asked for, 16 made: 50 % saved" in done.stderr
    assert "Differences on the same splits" in done.stdout
    folder = tmp_path / "experiments" / "discs"
    kept = json.loads((folder / "results.json").read_text())
    value = run_json(*words)
    assert [one["metrics"] for one in value["settings"]] == [one["metrics"] for one in kept["settings"]]
    assert value["passes_now"] == 0
    assert all(one["reused"] for one in value["settings"])
    mean = kept["settings"][0]["metrics"]["miou"]["mean"]
    assert f"{100 * mean:.2f}" in done.stdout
    for name in ("results.json", "results.csv", "results.md", "results.png"):
        assert str(folder.relative_to(tmp_path) / name) in done.stdout
    shown = run(*words, "--dry-run").stdout
    assert "the store has them all" in shown
    assert "3 settings, 3 of them trained already" in shown


def test_options_for_quick_looks(run_json, words):
    value = run_json(*words, "--only", "basic", "--only", "prompt", "--splits", "1", "--ensemble", "1",
                     "--max-steps", "5", "--limit", "7", "--out", "quick")  # fmt: skip
    assert [one["name"] for one in value["settings"]] == ["basic", "prompt"]
    assert [one["max_steps"] for one in value["settings"]] == [5, 5]
    assert value["passes_now"] == 14
    (compared,) = value["comparisons"]
    assert (compared["a"], compared["b"], compared["ci95"], compared["p"]) == ("prompt", "basic", None, None)


def test_what_cannot_be_is_refused_in_one_line(refused, words, tmp_path):
    assert "unknown experiment 'prompt'" in refused("experiment", "prompt")
    assert "did you mean 'prompts'" in refused("experiment", "prompt")
    assert "unknown setting 'basik'" in refused(*words, "--only", "basik")
    (tmp_path / "discs.toml").write_text((tmp_path / "discs.toml").read_text().replace('"basic,', '"basik,'))
    assert "unknown technique 'basik'" in refused(*words)
    assert not (tmp_path / "s.zarr").exists()

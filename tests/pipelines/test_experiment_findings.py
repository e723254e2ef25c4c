"""Several experiments and the document that reports them, small: one store, one head a setting, one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featstore.pipelines.experiment import findings as module
from featstore.pipelines.experiment import running
from featstore.pipelines.experiment.findings import main

ONE = """
title = "One at a time"
dataset = "folder:FOLDER"
model = "reference"

[extract]
layers = "up-level3-repeat2-vit-out"
timesteps = [50]
prompt = "a horse, high quality"

[head]
ensemble = 2
splits = 2
max_steps = 20

[axes]
extract.techniques = ["basic", "prompt"]

[[compare]]
along = "techniques"
to = "basic"
"""
BOTH = ONE.replace('"One at a time"', '"Both at once"').replace('"prompt"]', '"basic,prompt"]')
DOCUMENT = """# Findings

Written by hand: 12.3 %.

<!-- made: all -->
what was here before
<!-- end: all -->

## One

<!-- made: one -->
<!-- end: one -->

A last word \\1.

<!-- made: both -->
<!-- end: both -->
"""

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def place(labelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("one", ONE), ("both", BOTH)):
        (tmp_path / f"{name}.toml").write_text(text.replace("FOLDER", str(labelled)))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "findings.md").write_text(DOCUMENT)
    return tmp_path


def run(*words):
    main(["--store", "s.zarr", "--experiments", "one.toml", "both.toml", "--device", "cpu", "--workers", "1", *words])


def test_one_command_makes_every_figure_and_leaves_the_words(place, monkeypatch):
    trained = []
    inner = running.train_head
    monkeypatch.setattr(running, "train_head", lambda *both: trained.append(both[0]) or inner(*both))
    run()
    assert len(trained) == 3  # basic stands in both
    text = (place / "docs" / "findings.md").read_text()
    assert text.startswith("# Findings\n\nWritten by hand: 12.3 %.\n")
    assert "A last word \\1." in text
    assert "what was here before" not in text
    assert "40 passes asked for, 16 made: 60 % saved; 4 settings, 3 of them different: 6 heads." in text
    for name in ("one", "both"):
        folder = place / "docs" / "findings" / name
        part = text.partition(f"<!-- made: {name} -->")[2].partition(f"<!-- end: {name} -->")[0]
        value = json.loads((folder / "results.json").read_text())
        assert value["title"] in part
        for setting in value["settings"]:
            assert f"| {setting['name']} | miou | {100 * setting['metrics']['miou']['mean']:.2f} |" in part
        assert f"](findings/{name}/results.png)" in part
        assert (folder / "results.png").exists()
    run()
    assert len(trained) == 3
    assert (place / "docs" / "findings.md").read_text() == text


def test_a_document_without_a_place_is_refused_before_anything_starts(place):
    (place / "docs" / "findings.md").write_text(DOCUMENT.replace("<!-- end: both -->", ""))
    with pytest.raises(SystemExit, match=r"no place for 'both'\nhint: add the lines <!-- made: both -->"):
        run()
    assert not (place / "s.zarr").exists()
    with pytest.raises(SystemExit, match="cannot read"):
        run("--document", "docs/none.md")
    run("--document", "", "--out", "elsewhere", "--splits", "1", "--max-steps", "5")
    assert (place / "elsewhere" / "both" / "results.json").exists()
    assert not (place / "docs" / "findings").exists()


def test_the_document_of_the_project_has_a_place_for_every_finding():
    text = (Path(__file__).parents[2] / "docs" / "findings.md").read_text(encoding="utf-8")
    for name in (*module.FINDINGS, module.WHOLE):
        assert len(module._place(name).findall(text)) == 1, name

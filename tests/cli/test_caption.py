"""`featstore caption`, and the options of `extract` that take texts."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def words(photos, blip, tmp_path):
    options = {
        "--dataset": f"folder:{photos}",
        "--captioner": blip,
        "--out": tmp_path / "captions.json",
        "--max-new-tokens": "4",
        "--device": "cpu",
    }
    return [word for pair in options.items() for word in pair]


@pytest.mark.usefixtures("tiny")
def test_captions_from_the_command_line_to_features(run, run_json, words, photos, tmp_path):
    report = run_json("caption", *words, "--limit", "3")
    assert (report["images"], report["captioned"], report["reused"], report["failed"]) == (3, 3, 0, [])
    result = run("caption", *words, "--limit", "4")
    assert "3 of 4 images have a text" in result.stderr
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("use it: ")]
    assert line.endswith(f"--techniques prompt:caption --captions {tmp_path / 'captions.json'} --limit 4")
    command = line.removeprefix("use it: featstore ").split()
    shown = run_json(*command, "--model", "reference", "--store", tmp_path / "s.zarr", "--prompt-chunks", "2")
    (made,) = shown["runs"]
    assert (made["technique"], made["computed"]) == ("prompt:caption", 4)
    assert made["layers"]["attn-up-cross-2"][0] == 154


def test_failures_are_told_and_the_exit_status_says_so(run, words, photos):
    (photos / "02.png").write_bytes(b"no picture")
    result = run("caption", *words, "--limit", "4", code=1)
    assert "failed 02.png" in result.stderr
    report = json.loads(run("caption", *words, "--limit", "4", "--json", code=1).stdout)
    assert [one["key"] for one in report["failed"]] == ["02.png"]
    assert report["reused"] == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--captioner", "nobody"], ["no captioner folder nobody", "Salesforce/"]),
        (["--split", "tests"], ["'tests'", "known: all"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--dataset", "toyhorses"], ["did you mean 'toyhorse'"]),
    ],
)
def test_bad_requests(refused, words, changes, said, tmp_path):
    message = refused("caption", *words, *changes)
    for part in said:
        assert part in message
    assert not (tmp_path / "captions.json").exists()


@pytest.mark.usefixtures("tiny")
def test_bad_texts_for_extract(refused, photos, tmp_path):
    words = ("--dataset", f"folder:{photos}", "--store", tmp_path / "s.zarr", "--model", "reference")
    captions = ("--techniques", "prompt:caption", "--captions", tmp_path / "none.json")
    assert "there is no captions file" in refused("extract", *words, *captions)
    assert "--prompt-chunks 0" in refused("extract", *words, "--techniques", "basic", "--prompt-chunks", "0")
    assert not (tmp_path / "s.zarr").exists()

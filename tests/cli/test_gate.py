"""`featstore gate` on a command line."""

from __future__ import annotations

import json

import pytest

WORDS = (
    "gate",
    "--model",
    "reference",
    "--techniques",
    "controlnet,cfg",
    "--limit",
    3,
    "--steps",
    3,
    "--device",
    "cpu",
)


@pytest.fixture(autouse=True)
def _place(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_json_is_what_scripts_rely_on(run_json, photos, tmp_path):
    found = run_json(*WORDS, "--dataset", f"folder:{photos}")
    assert found["anchor"] == "basic@501"
    assert found["seed"] == 0
    assert len(found["images"]) == 3
    basic, *others = found["techniques"]
    assert basic["technique"] == "basic"
    assert [one["technique"] for one in others] == ["controlnet", "cfg"]
    for one in found["techniques"]:
        assert one["score_ci95"][0] <= one["score"] <= one["score_ci95"][1]
        assert isinstance(one["suppresses"], bool)
        assert isinstance(one["closer_than_reference"], bool)
        assert 0 < one["psnr_db"] < 60
        assert -1 <= one["ssim"] <= 1
    assert found["extract_command"].startswith(f"featstore extract --dataset folder:{photos} --techniques ")
    assert found == json.loads((tmp_path / "gate" / "gate.json").read_text())
    assert (tmp_path / "gate" / "gate.png").is_file()
    assert not (tmp_path / "features.zarr").exists()


def test_the_table_gives_a_verdict_and_the_next_command(run, photos, tmp_path):
    result = run(*WORDS, "--dataset", f"folder:{photos}", "--timesteps", "50,200", "--out", "here")
    for words in ("basic t050", "controlnet t200", "score", "SSIM", "verdict", "next: featstore extract"):
        assert words in result.stdout, words
    assert "without lpips, clip, dino" in result.stderr
    assert (tmp_path / "here" / "gate.png").is_file()


def test_the_command_that_it_proposes_runs(run, run_json, photos):
    command = run_json(*WORDS, "--dataset", f"folder:{photos}")["extract_command"]
    run(*command.split()[1:], "--dry-run")


def test_an_unreadable_image_is_reported_by_the_exit_status(run, photos):
    (photos / "00.png").write_bytes(b"no picture")
    assert "failed 00.png" in run(*WORDS, "--dataset", f"folder:{photos}", code=1).stderr


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--anchor", "basik@501"), "did you mean 'basic'"),
        (("--anchor", "basic@0"), "no content shift"),
        (("--strength", "0"), "--strength 0"),
        (("--limit", "1"), "--limit 1"),
        (("--layers", "legcy"), "did you mean 'legacy'"),
        (("--timesteps", "fifty"), "not integers"),
        (("--device", "tpu"), "'tpu'"),
    ],
)
def test_bad_requests(refused, photos, tmp_path, words, error):
    assert error in refused(*WORDS, "--dataset", f"folder:{photos}", *words)
    assert not (tmp_path / "gate").exists()

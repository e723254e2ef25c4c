"""`featstore convert-ddpm`, and its folder in the other commands."""

from __future__ import annotations

import pytest
import torch

from tests.models.handwritten_ddpm import Guided


@pytest.fixture
def checkpoint(tmp_path):
    unet = Guided(mult=(1, 2), resnets=1, attends=(False, True))
    unet.forward(torch.zeros(1, 3, 8, 8), 0)
    torch.save(unet.state, tmp_path / "lsun.pt")
    return tmp_path / "lsun.pt"


def test_a_checkpoint_becomes_a_model_that_other_commands_take(run, run_json, refused, checkpoint, photos, tmp_path):
    words = ("convert-ddpm", checkpoint, tmp_path / "horse", "--image-size", "32", "--head-channels", "16")
    assert "--allow-pickle" in refused(*words)
    made = run_json(*words, "--allow-pickle")
    assert made["model"] == f"ddpm:{tmp_path / 'horse'}"
    assert (made["widths"], made["attention_at_px"], made["learned_variance"]) == ([32, 64], [16], True)
    assert "exists already" in refused(*words, "--allow-pickle")
    shown = run("convert-ddpm", checkpoint, tmp_path / "cat", *words[3:], "--allow-pickle").stdout.splitlines()
    assert len(shown) == 2
    assert shown[1] == f"use it: --model ddpm:{tmp_path / 'cat'} --timesteps 50,150,250"
    detail = run_json("models", made["model"])
    assert set(detail["presets"]) == {"legacy", "full"}
    extract = ("extract", "--dataset", f"folder:{photos}", "--model", made["model"], "--limit", "2", "--device", "cpu")
    extract += ("--store", tmp_path / "s.zarr", "--techniques")
    for technique in ("prompt", "controlnet", "lora", "cfg"):
        assert f"technique '{technique}' means nothing for model 'horse' (DDPM)" in refused(*extract, technique)
    report = run_json(*extract, "basic", "--timesteps", "50,150,250")
    assert [(one["timestep"], one["computed"], one["failed"]) for one in report["runs"]] == [
        (50, 2, []),
        (150, 2, []),
        (250, 2, []),
    ]
    assert set(report["runs"][0]["layers"]) == set(detail["presets"]["legacy"])


def test_a_checkpoint_of_something_else_is_refused_by_its_key(refused, tmp_path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "resnet.pt")
    shown = refused("convert-ddpm", tmp_path / "resnet.pt", tmp_path / "out", "--allow-pickle")
    assert "'time_embed.0.weight' is not among its 1 keys, of which one is 'conv1.weight'" in shown
    assert not (tmp_path / "out").exists()

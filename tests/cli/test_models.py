"""`featstore models` on a machine with no weights but those that come with it."""

import shutil

import pytest
from huggingface_hub import constants

LEGACY_512 = {
    "up-level0-upsampler-out": [1280, 16, 16],
    "up-level1-upsampler-out": [1280, 32, 32],
    "up-level2-upsampler-out": [640, 64, 64],
    "up-level3-repeat2-vit-out": [320, 64, 64],
    "attn-up-cross-2": [77, 32, 32],
    "attn-up-cross-4": [77, 16, 16],
}


@pytest.fixture(autouse=True)
def _nothing_here(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEATSTORE_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_table_says_what_is_there(run_json, run, weights_root, tmp_path, monkeypatch):
    found = run_json("models")["models"]
    assert {"reference", "sd15", "sd21", "sdxl", "playground-v2"} <= set(found)
    assert found["reference"]["there"] == "folder"
    sd15 = found["sd15"]
    assert (sd15["there"], sd15["present"], sd15["where"]) == (None, False, "weights/sd15")
    assert sd15["hub"]["pipeline"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert "hf download stable-diffusion-v1-5/stable-diffusion-v1-5" in sd15["how_to_get"]
    shutil.copytree(weights_root / "reference", tmp_path / "root" / "sd15")
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path / "root"))
    assert run_json("models")["models"]["sd15"]["there"] == "folder"
    rows = [line.split() for line in run("models").stdout.splitlines()]
    there = {row[0]: row[1] for row in rows if len(row) > 2}
    assert (there["sd15"], there["sdxl"]) == ("folder", "no")


def test_layers_are_listed_without_weights(run_json, run):
    detail = run_json("models", "sd15")
    assert {name: detail["layers"][name] for name in detail["presets"]["legacy"]} == LEGACY_512
    assert detail["weights_digest"] is None
    assert "is not on this machine" in detail["problem"]
    assert detail["where"] == "weights/sd15"
    assert run_json("models", "sdxl", "--image-size", "512x1024")["layers"]["unet-in"] == [4, 64, 128]
    text = run("models", "sd15", "--layers").stdout
    for part in (
        "stable-diffusion-v1-5/stable-diffusion-v1-5 on the Hugging Face Hub",
        "--local-dir weights/sd15/pipeline",
        "up-level3-repeat2-vit-out",
    ):
        assert part in text


def test_weights_that_cannot_be_used_are_told_beside_the_layers(run_json, weights_root, tmp_path):
    folder = shutil.copytree(weights_root / "reference" / "pipeline", tmp_path / "mine")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    detail = run_json("models", folder)
    assert "only as a pickle" in detail["problem"]
    assert "--allow-pickle" in detail["how_to_get"]
    assert detail["layers"]["unet-in"] == [4, 16, 16]


def test_a_model_of_the_hub_that_cannot_be_reached(refused):
    message = refused("models", "somebody/some-model")
    for part in ("HF_HUB_OFFLINE", "weights/somebody_some-model/pipeline", "hf download somebody/some-model"):
        assert part in message

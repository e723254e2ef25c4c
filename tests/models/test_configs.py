"""The configurations that come with featstore, against the stock modules built of them on torch's meta device."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from huggingface_hub import constants
from torch import nn

from featstore import models
from featstore.errors import NotFoundError
from featstore.models import MODELS
from featstore.models.entries import CONFIGS
from featstore.models.families import open_folder
from featstore.models.layers import Keys, Read

# Numbers of parameters as they are known of the published weights.
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
    "pixart-alpha": {"vae": 83_653_863, "text_encoder": 4_762_310_656},
    "pixart-sigma": {"vae": 83_653_863},
    "sd3": {"text_encoder": 123_650_304, "text_encoder_2": 694_659_840, "text_encoder_3": 4_762_310_656},
}
# Of these only the size that is said of them in a few digits.
ABOUT = {"pixart-alpha": 0.61e9, "pixart-sigma": 0.61e9, "sd3": 2.03e9}
LEGACY_512 = {
    "up-level0-upsampler-out": (1280, 16, 16),
    "up-level1-upsampler-out": (1280, 32, 32),
    "up-level2-upsampler-out": (640, 64, 64),
    "up-level3-repeat2-vit-out": (320, 64, 64),
    "attn-up-cross-2": (77, 32, 32),
    "attn-up-cross-4": (77, 16, 16),
}


def config(model: str, part: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((CONFIGS / model / part / "config.json").read_text())
    return value


def build(model: str, part: str) -> nn.Module:
    """The stock module of a part, without memory."""
    values = config(model, part)
    with torch.device("meta"):
        if "_class_name" in values:
            return getattr(diffusers, values["_class_name"]).from_config(values)
        kind = getattr(transformers, values["architectures"][0])
        return kind(kind.config_class.from_dict(values))


def text_and_sizes(model: str) -> dict[str, Any]:
    """What the denoiser is given beside latents and timestep."""
    values = config(model, "transformer" if (CONFIGS / model / "transformer").is_dir() else "unet")
    empty = {"device": "meta"}
    if model == "sd3":
        states, pooled = torch.zeros(1, 77 + 256, 4096, **empty), torch.zeros(1, 2048, **empty)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}
    if model.startswith("pixart"):
        length = {"pixart-alpha": 120, "pixart-sigma": 300}[model]
        sizes = (torch.zeros(1, 2, **empty), torch.zeros(1, 1, **empty)) if model == "pixart-alpha" else (None, None)
        return {
            "encoder_hidden_states": torch.zeros(1, length, 4096, **empty),
            "added_cond_kwargs": dict(zip(("resolution", "aspect_ratio"), sizes, strict=True)),
        }
    given: dict[str, Any] = {"encoder_hidden_states": torch.zeros(1, 77, values["cross_attention_dim"], **empty)}
    if values.get("addition_embed_type"):
        given["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(1, 1280, **empty),
            "time_ids": torch.zeros(1, 6, **empty),
        }
    return given


def shape(value: Any, index: int = 0) -> tuple[int, ...]:
    value = value[index] if isinstance(value, tuple) else value
    value = getattr(value, "sample", value)
    return tuple(value.shape)


@pytest.mark.parametrize(
    ("model", "height", "width"),
    [("sd15", 512, 512), ("sd21", 512, 768), ("sdxl", 1024, 1024), ("pixart-alpha", 512, 768), ("sd3", 512, 768)],
)
def test_every_layer_is_in_the_stock_module_and_has_its_shape(model: str, height: int, width: int) -> None:
    source = open_folder(model, CONFIGS / model)
    part = "transformer" if (CONFIGS / model / "transformer").is_dir() else "unet"
    denoiser = build(model, part)
    inputs: dict[str, tuple[int, ...]] = {}
    outputs: dict[str, Any] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs[name], outputs[name] = shape(next(iter((*args, *kwargs.values())))), output

        module.register_forward_hook(hook, with_kwargs=True)

    for name, module in denoiser.named_modules():
        watch(name, module)
    latents = torch.zeros(1, config(model, "vae")["latent_channels"], height // 8, width // 8, device="meta")
    with torch.no_grad():
        denoiser(latents, timestep=torch.tensor([1], device="meta"), **text_and_sizes(model))

    layers = source.layer_names(height, width)
    assert layers
    for name, (c, h, w) in layers.items():
        tap = source.taps[name]
        for module in tap.modules:
            if tap.read is Read.INPUT:
                assert inputs[module] == (1, c, h, w), name
            elif tap.read in (Read.OUTPUT, Read.BRANCH):
                assert shape(outputs[module], tap.output) == (1, c, h, w), name
            elif tap.read is Read.TOKENS:
                assert shape(outputs[module], tap.output) == (1, h * w, c), name
            else:
                keys = "add_k_proj" if tap.keys is Keys.TEXT else "to_k"
                assert shape(outputs[f"{module}.to_q"])[1] == h * w, name
                assert shape(outputs[f"{module}.{keys}"])[1] == c, name
    if model == "sd15":
        assert source.resolve_layers("legacy", 512, 512) == LEGACY_512
    # Nothing that happens is left unnamed: every projection of the image is some layer's.
    taken = {module for tap in source.taps.values() for module in tap.modules}
    assert {name for name in outputs if name.endswith(".to_q")} <= taken


@pytest.mark.parametrize("model", PARAMETERS)
def test_the_parts_are_of_the_size_that_is_published(model: str) -> None:
    for part, count in PARAMETERS[model].items():
        assert sum(p.numel() for p in build(model, part).parameters()) == count, part
    if model in ABOUT:
        count = sum(p.numel() for name, p in build(model, "transformer").named_parameters())
        assert math.isclose(count, ABOUT[model], rel_tol=0.03)


def test_playground_is_of_the_shape_of_sdxl() -> None:
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert config("playground-v2", part) == config("sdxl", part)


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"reference", "ddpm"}))
def test_a_named_model_is_described_without_any_weights(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FEATSTORE_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
    source = models.describe(model)
    side = source.default_image_size_px
    assert side == (512 if model in ("sd15", "sd21") else 1024)
    assert set(source.resolve_layers("legacy,full", side, side)) <= set(source.layer_names(side, side))
    for use in (lambda: source.weights_digest, source.load, lambda: source.tokens("a horse")):
        with pytest.raises(NotFoundError, match=f"the pipeline of model '{model}' is not on this machine") as caught:
            use()
        assert f"hf download {MODELS[model].hub['pipeline']}" in str(caught.value.hint)
        assert f"--local-dir weights/{model}/pipeline" in str(caught.value.hint)
    assert not (tmp_path / "cache").exists()

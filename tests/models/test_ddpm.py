"""Unconditional DDPMs: every layer against forward passes written out by hand, which share nothing with the code."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from featstore import models
from featstore.errors import BadRequestError, NotFoundError
from featstore.extraction.forward import Extractor
from featstore.techniques import parse, resolve
from tests.models.handwritten_ddpm import Maps, plain
from tests.tiny_models import TextDataset

TIMESTEP, SEED, SIZE = 150, 3, (32, 48)


def pictures(count: int, height: int, width: int) -> np.ndarray:
    random = np.random.default_rng(5)
    coarse = random.integers(0, 256, (count, height // 8, width // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2) // 2 + random.integers(0, 100, (count, height, width, 3), dtype=np.uint8)


def noised(images: np.ndarray, digests: list[str], timestep: int) -> torch.Tensor:
    """Pixels in [-1, 1] with each image's noise, by linear betas from 1e-4 to 0.02."""
    left = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[timestep]
    rows = []
    for image, digest in zip(images, digests, strict=True):
        key = int(hashlib.sha256(f"featstore noise|{SEED}|{digest}|{timestep}".encode()).hexdigest()[:32], 16)
        drawn = np.random.Generator(np.random.Philox(key=key)).standard_normal((3, *image.shape[:2]), dtype=np.float32)
        rows.append(np.sqrt(left) * (image.transpose(2, 0, 1) / 127.5 - 1) + np.sqrt(1 - left) * drawn)
    return torch.from_numpy(np.stack(rows)).float()


def relative(found: np.ndarray, wanted: torch.Tensor) -> float:
    return float(np.linalg.norm(found - wanted.numpy()) / wanted.norm())


def extracted(folder: Path, images: np.ndarray, digests: list[str], **options: Any) -> Maps:
    source = models.resolve(f"ddpm:{folder}")
    steerings = [resolve(t, dataset=TextDataset(), model=source) for t in parse("basic")]
    height, width = images.shape[1:3]
    with source.load() as backbone:
        extractor = Extractor(
            backbone, steerings, list(source.taps), batch_size=2, height_px=height, width_px=width, precision="float32"
        )
        pixels = extractor.encode(images)
        maps, bad = extractor.run(0, pixels, images, digests, TIMESTEP, SEED, **options)
    assert bad == {}
    shapes = source.layer_names(height, width)
    assert {layer: value.shape[1:] for layer, value in maps.items()} == shapes
    return maps


def check(found: Maps, wanted: Maps) -> None:
    assert set(found) == set(wanted)
    for layer, value in wanted.items():
        for row in range(len(value)):
            assert relative(found[layer][row], value[row]) < 1e-4, (layer, row)


@pytest.fixture
def ho(tmp_path: Path) -> tuple[UNet2DModel, Path]:
    """A UNet as in google/ddpm-cat-256, tiny, in a folder that diffusers' pipeline saved."""
    torch.manual_seed(2)
    unet = UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_num_groups=4,
        norm_eps=1e-6,
    ).eval()
    for name, parameter in unet.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            torch.nn.init.normal_(parameter, std=0.5)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
    folder = tmp_path / "ddpm-tiny-32"
    DDPMPipeline(unet, DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder)
    return unet, folder


@pytest.mark.parametrize("layout", ["today's", "flat, old keys"])
@torch.no_grad()
def test_every_layer_of_a_diffusers_folder(ho: tuple[UNet2DModel, Path], layout: str) -> None:
    unet, folder = ho
    if layout == "flat, old keys":
        # As the first DDPMs on the hub are: all files side by side, attention under the keys of its first version.
        weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, name in old.items():
            weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
        assert any(".query." in key for key in weights)
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        for part in ("unet", "scheduler"):
            for path in (folder / part).iterdir():
                path.rename(folder / path.name)
            (folder / part).rmdir()
    images = pictures(2, *SIZE)
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    wanted = plain(unet, noised(images, digests, TIMESTEP), TIMESTEP, groups=4, eps=1e-6)
    check(extracted(folder, images, digests), wanted)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds = 10"),
        ("unet/config.json", {"in_channels": 1}, "in_channels = 1"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier'"),
        ("unet/config.json", {"mid_block_type": "UNetMidBlock2DCrossAttn"}, "block of type 'UNetMidBlock2DCrossAttn'"),
        ("unet/config.json", {"up_block_types": ["AttnSkipUpBlock2D"] * 3}, "block of type 'AttnSkipUpBlock2D'"),
        ("unet/config.json", {"sample_size": None}, "does not say sample_size"),
        ("scheduler/scheduler_config.json", {"beta_start": None}, "has no betas"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 4000}, "has 4000 timesteps"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "'sample' is predicted"),
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "UNet2DConditionModel as its unet"),
    ],
)
def test_folders_of_other_models_are_refused(
    ho: tuple[UNet2DModel, Path], file: str, changes: dict[str, Any], message: str
) -> None:
    path = ho[1] / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BadRequestError, match=message):
        models.resolve(f"ddpm:{ho[1]}")


def test_the_prefix_takes_ddpms_only(weights_root: Path, tmp_path: Path) -> None:
    other = weights_root / "reference" / "pipeline"
    with pytest.raises(BadRequestError, match="no unconditional DDPM but a StableDiffusion") as caught:
        models.resolve(f"ddpm:{other}")
    assert f"--model {other}" in str(caught.value.hint)
    with pytest.raises(NotFoundError, match="no folder") as absent:
        models.resolve(f"ddpm:{tmp_path / 'absent'}")
    assert "convert-ddpm" in str(absent.value.hint)


def test_what_a_ddpm_does_not_take_is_refused(ho: tuple[UNet2DModel, Path], tmp_path: Path) -> None:
    with models.resolve(f"ddpm:{ho[1]}").load() as backbone:
        asked: dict[str, Callable[[], object]] = {
            "ControlNets": lambda: backbone.controlnet(tmp_path, "1" * 64),
            "LoRAs": lambda: backbone.lora(tmp_path, "2" * 64),
            "LoRAs act": lambda: backbone.adapted([("one", 1.0)]),
            "IP-Adapters": lambda: backbone.ip_adapter(tmp_path, tmp_path, "3" * 64),
            "IP-Adapters act": lambda: backbone.looking("3" * 64, 1.0),
            "IP-Adapters see": lambda: backbone.see("3" * 64, None),
        }
        for what, ask in asked.items():
            with pytest.raises(BadRequestError, match=rf"\(DDPM\) takes no {what.split()[0]}$") as caught:
                ask()
            assert caught.value.hint == "it can be steered by: basic"
        with backbone.adapted([]):
            pass


def test_planning_imports_no_torch() -> None:
    code = """
import sys
from featstore import models
source = models.describe("ddpm")
source.resolve_layers("ddpm-segmentation,full", 256, 256), source.default_layers
heavy = {"torch", "diffusers", "transformers"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

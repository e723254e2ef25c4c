"""A tiny random IP-Adapter for the models of `tests.tiny_models`, with its image encoder, in the published layout."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

TOKENS = 4
EMBED = 12


def build_tiny_ip_adapter(folder: Path, pipeline: Path, seed: int = 5) -> Path:
    """Write ``ip-adapter.safetensors`` and ``image_encoder`` into the folder; returns the file."""
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet", use_safetensors=True)
    torch.manual_seed(seed)
    width = unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": torch.randn(TOKENS * width, EMBED) * 0.3,
        "image_proj.proj.bias": torch.zeros(TOKENS * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    number = 1
    for name in unet.attn_processors:
        if not name.endswith("attn1.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for part in ("k", "v"):
                tensors[f"ip_adapter.{number}.to_{part}_ip.weight"] = torch.randn(hidden, width) * 0.5
            number += 2
    folder.mkdir(parents=True)
    save_file(tensors, folder / "ip-adapter.safetensors")
    eyes = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, projection_dim=EMBED, num_hidden_layers=2, num_attention_heads=2,
            image_size=32, patch_size=8,
        )
    )  # fmt: skip
    eyes.save_pretrained(folder / "image_encoder")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "image_encoder")
    return folder / "ip-adapter.safetensors"

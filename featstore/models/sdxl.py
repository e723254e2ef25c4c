"""Stable Diffusion XL 1.0, the base model."""

from __future__ import annotations

from featstore.models.entries import ModelEntry

ENTRY = ModelEntry(
    name="sdxl",
    title="Stable Diffusion XL 1.0 base, 1024 px",
    family="Stable Diffusion XL (UNet2DConditionModel, AutoencoderKL, two CLIP text encoders)",
    hub={
        "pipeline": "stabilityai/stable-diffusion-xl-base-1.0",
        "controlnet-canny": "diffusers/controlnet-canny-sdxl-1.0",
        "controlnet-depth": "diffusers/controlnet-depth-sdxl-1.0",
    },
)

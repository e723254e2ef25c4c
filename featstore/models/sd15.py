"""Stable Diffusion 1.5."""

from __future__ import annotations

from featstore.models.entries import ModelEntry

ENTRY = ModelEntry(
    name="sd15",
    title="Stable Diffusion 1.5, 512 px",
    family="Stable Diffusion (UNet2DConditionModel, AutoencoderKL, CLIP text encoder)",
    hub={
        "pipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "controlnet-canny": "lllyasviel/sd-controlnet-canny",
        "controlnet-depth": "lllyasviel/sd-controlnet-depth",
        "controlnet-hed": "lllyasviel/sd-controlnet-hed",
        "controlnet-lineart": "lllyasviel/control_v11p_sd15_lineart",
        "controlnet-openpose": "lllyasviel/sd-controlnet-openpose",
    },
)

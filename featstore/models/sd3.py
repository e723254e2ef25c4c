"""Stable Diffusion 3 medium."""

from __future__ import annotations

from featstore.models.entries import ModelEntry

ENTRY = ModelEntry(
    name="sd3",
    title="Stable Diffusion 3 medium, 1024 px",
    family="Stable Diffusion 3 (SD3Transformer2DModel, AutoencoderKL, two CLIP text encoders, T5)",
    hub={"pipeline": "stabilityai/stable-diffusion-3-medium-diffusers"},
)

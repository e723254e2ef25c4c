"""Unconditional DDPMs, loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DModel

from featstore.models.backbones.base import Backbone, Text
from featstore.models.backbones.loading import (
    diffusion_schedule,
    errors_about,
    freeze,
    pretrained,
    torch_device,
    torch_dtype,
)

if TYPE_CHECKING:
    from featstore.models.families.ddpm import DDPM


class DDPMBackbone(Backbone):
    """UNet and noise schedule. A UNet that also predicts its variance gives six channels; the first three are noise.

    Args:
        source: the folder.
        device: a torch device.
        compute_dtype: element type of the passes.

    Raises:
        BadRequestError: for a device or type that is not there, or a damaged folder.
        NotFoundError: if weights are missing.
    """

    source: DDPM

    def __init__(self, source: DDPM, *, device: str, compute_dtype: str) -> None:
        dtype, where = torch_dtype(compute_dtype), torch_device(device)
        weights = source.component_weights["unet"]
        with errors_about(f"model {source.name!r} in {source.folder}"):
            schedule = diffusion_schedule(source, where)
            unet = pretrained(UNet2DModel, source.component_folder("unet"), weights, dtype)
        super().__init__(source, denoiser=freeze(unet, where), schedule=schedule, device=where, dtype=dtype)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """The pixels themselves, in [-1, 1]; see `Backbone.encode_images`."""
        return pixels.to(self.device, self.dtype)

    def encode_text(self, text: str, chunks: int = 1) -> Text:
        """Nothing: the model takes no text."""
        return {}

    def inputs(
        self, noised: torch.Tensor, timesteps: torch.Tensor, text: Text, height_px: int, width_px: int
    ) -> dict[str, Any]:
        """See `Backbone.inputs`."""
        return {"sample": noised, "timestep": timesteps}

    def _drop(self) -> None:
        """There is nothing but the denoiser."""

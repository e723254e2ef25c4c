"""What loaded models on an autoencoder's latents have in common."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import AutoencoderKL
from torch import nn

from featstore.models.backbones.base import Backbone, Text
from featstore.models.backbones.loading import (
    diffusion_schedule,
    errors_about,
    freeze,
    pretrained,
    torch_device,
    torch_dtype,
)
from featstore.models.backbones.schedules import Schedule

if TYPE_CHECKING:
    from featstore.models.families.latents import LatentSource


class LatentBackbone(Backbone):
    """Denoiser, VAE encoder, text encoders and noise schedule.

    Args:
        source: the folder.
        device: a torch device.
        compute_dtype: element type of the passes.

    Raises:
        BadRequestError: for a device or type that is not there, or a damaged folder.
        NotFoundError: if weights are missing.
    """

    source: LatentSource
    part: ClassVar[str]
    """Name of the denoiser's folder."""
    kind: ClassVar[Any]
    """Class of the denoiser."""
    vae_in_float32: ClassVar[bool] = False
    """Whether the autoencoder runs in float32 even where its configuration does not ask for it."""

    def __init__(self, source: LatentSource, *, device: str, compute_dtype: str) -> None:
        dtype, where = torch_dtype(compute_dtype), torch_device(device)
        folder, weights = source.folder, source.component_weights
        with errors_about(f"model {source.name!r} in {folder}"):
            schedule = self._load_schedule(source, where)
            # Autoencoders that say so overflow in half precision.
            upcast = self.vae_in_float32 or source.vae_config.get("force_upcast", True)
            vae = pretrained(AutoencoderKL, folder / "vae", weights["vae"], torch.float32 if upcast else dtype)
            # Features need no pictures: the decoder is dropped before it ever reaches the device.
            del vae.decoder
            vae.post_quant_conv = None
            denoiser = pretrained(self.kind, folder / self.part, weights[self.part], dtype)
            self.text_encoders: list[Any] = [freeze(one, where) for one in self._load_text(source, dtype)]
        self.vae = freeze(vae, where)
        super().__init__(source, denoiser=freeze(denoiser, where), schedule=schedule, device=where, dtype=dtype)

    def _load_schedule(self, source: LatentSource, device: torch.device) -> Schedule:
        """The model's own noise schedule, on the device."""
        return diffusion_schedule(source, device)

    @abc.abstractmethod
    def _load_text(self, source: LatentSource, dtype: torch.dtype) -> list[nn.Module]:
        """The text encoders; their tokenizers are kept beside them."""

    @abc.abstractmethod
    def text_states(self, text: str, chunks: int = 1) -> Text:
        """What `encode_text` returns, with the encoders on the device, and gradients where the caller wants them."""

    @property
    def latent_scale(self) -> float:
        """Factor between the VAE's latents and the denoiser's."""
        return float(self.vae.config.scaling_factor)

    @property
    def latent_shift(self) -> float:
        """What is taken from the VAE's latents before they are scaled; 0 where its configuration has none."""
        return float(self.vae.config.shift_factor or 0.0)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `Backbone.encode_images`."""
        mean = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mean
        scaled: torch.Tensor = (mean - self.latent_shift) * self.latent_scale
        return scaled.to(self.dtype)

    def encode_text(self, text: str, chunks: int = 1) -> Text:
        """See `Backbone.encode_text`; as the model's own pipeline makes it."""
        self._check_open()
        for encoder in self.text_encoders:
            encoder.to(self.device)
        with torch.inference_mode():
            return self.text_states(text, chunks)

    def offload_text(self) -> None:
        """See `Backbone.offload_text`."""
        for encoder in self.text_encoders:
            encoder.to("cpu")

    def _drop(self) -> None:
        self.text_encoders.clear()
        if hasattr(self, "vae"):
            del self.vae

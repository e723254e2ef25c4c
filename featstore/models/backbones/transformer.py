"""What loaded transformers on an autoencoder's latents have in common."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import AutoencoderKL
from torch import nn

from featstore.models.backbones.base import Backbone, Text
from featstore.models.backbones.loading import errors_about, freeze, pretrained, torch_device, torch_dtype

if TYPE_CHECKING:
    from featstore.models.families.transformer import LatentTransformer


class TransformerBackbone(Backbone):
    """Transformer, VAE encoder and text encoders.

    Args:
        source: the folder.
        device: a torch device.
        compute_dtype: element type of the passes.

    Raises:
        BadRequestError: for a device or type that is not there, or a damaged folder.
        NotFoundError: if weights are missing.
    """

    source: LatentTransformer
    kind: ClassVar[Any]
    """Class of the transformer."""

    def __init__(self, source: LatentTransformer, *, device: str, compute_dtype: str) -> None:
        dtype, where = torch_dtype(compute_dtype), torch_device(device)
        folder, weights = source.folder, source.component_weights
        with errors_about(f"model {source.name!r} in {folder}"):
            # Autoencoders that say so overflow in half precision.
            vae_dtype = torch.float32 if source.vae_config.get("force_upcast", True) else dtype
            vae = pretrained(AutoencoderKL, folder / "vae", weights["vae"], vae_dtype)
            # Features need no pictures: the decoder is dropped before it ever reaches the device.
            del vae.decoder
            vae.post_quant_conv = None
            transformer = pretrained(self.kind, folder / "transformer", weights["transformer"], dtype)
            self.text_encoders: list[Any] = [freeze(one, where) for one in self._load_text(source, dtype)]
        self.vae = freeze(vae, where)
        super().__init__(source, denoiser=freeze(transformer, where), device=where, dtype=dtype)

    @abc.abstractmethod
    def _load_text(self, source: LatentTransformer, dtype: torch.dtype) -> list[nn.Module]:
        """The text encoders; their tokenizers are kept beside them."""

    @abc.abstractmethod
    def _encode(self, text: str) -> Text:
        """`encode_text`, with the encoders on the device."""

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `Backbone.encode_images`."""
        mean = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mean
        shift = self.vae.config.shift_factor or 0.0
        scaled: torch.Tensor = (mean - shift) * self.vae.config.scaling_factor
        return scaled.to(self.dtype)

    def encode_text(self, text: str, chunks: int = 1) -> Text:
        """See `Backbone.encode_text`; as the model's own pipeline makes it, in the one chunk that it takes."""
        self._check_open()
        for encoder in self.text_encoders:
            encoder.to(self.device)
        with torch.inference_mode():
            return self._encode(text)

    def offload_text(self) -> None:
        """See `Backbone.offload_text`."""
        for encoder in self.text_encoders:
            encoder.to("cpu")

    def _drop(self) -> None:
        self.text_encoders.clear()
        if hasattr(self, "vae"):
            del self.vae

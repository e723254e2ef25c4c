"""Stable Diffusion 1 and 2, loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from featstore.models.adapters import Adapters
from featstore.models.backbones.base import Backbone, Text
from featstore.models.backbones.loading import (
    alphas_cumprod,
    errors_about,
    freeze,
    prediction_type,
    pretrained,
    pretrained_text,
    torch_device,
    torch_dtype,
)
from featstore.models.backbones.schedules import ddim_step, ddpm_noised
from featstore.models.backbones.text import clip_chunks
from featstore.models.files import DIFFUSERS_STEM, weight_files
from featstore.models.ip_adapters import IPAdapters
from featstore.models.tokens import load_tokenizer

if TYPE_CHECKING:
    from featstore.datasets.base import UInt8Array
    from featstore.models.families.stable_diffusion import StableDiffusion


class StableDiffusionBackbone(Backbone):
    """UNet, VAE encoder, text encoder and noise schedule. ControlNets and LoRAs are loaded on demand, once each.

    Args:
        source: the folder.
        device: a torch device.
        compute_dtype: element type of the passes.

    Raises:
        BadRequestError: for a device or type that is not there, or a damaged folder.
        NotFoundError: if weights are missing.
    """

    source: StableDiffusion
    vae_in_float32: ClassVar[bool] = False
    """Whether the autoencoder runs in float32 even where its configuration does not ask for it."""

    def __init__(self, source: StableDiffusion, *, device: str, compute_dtype: str) -> None:
        dtype, where = torch_dtype(compute_dtype), torch_device(device)
        folder, weights = source.folder, source.component_weights
        with errors_about(f"model {source.name!r} in {folder}"):
            self.alphas_cumprod = alphas_cumprod(source)
            """float32 (1000,) on the CPU: the share of the signal that is left at each timestep."""
            self.prediction_type = prediction_type(source)
            # Autoencoders that say so overflow in half precision.
            upcast = self.vae_in_float32 or source.vae_config.get("force_upcast", True)
            vae_dtype = torch.float32 if upcast else dtype
            vae = pretrained(AutoencoderKL, folder / "vae", weights["vae"], vae_dtype)
            # Features need no pictures: the decoder is dropped before it ever reaches the device.
            del vae.decoder
            vae.post_quant_conv = None
            unet = pretrained(UNet2DConditionModel, folder / "unet", weights["unet"], dtype)
            self.text_encoders = self._load_text(source, dtype, where)
        self.vae = freeze(vae, where)
        self.unet: UNet2DConditionModel = freeze(unet, where)
        super().__init__(source, denoiser=self.unet, device=where, dtype=dtype)
        self._controlnets: dict[str, ControlNetModel] = {}
        self._adapters = Adapters(self._adaptable())
        self._ip_adapters = IPAdapters(self.unet)

    def _adaptable(self) -> dict[str, nn.Module]:
        """What a LoRA can change, by the name that its files give it."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def _load_text(self, source: StableDiffusion, dtype: torch.dtype, device: torch.device) -> list[Any]:
        """The text encoders, on the device; tokenizers beside them."""
        encoder = pretrained_text(
            CLIPTextModel, source.folder / "text_encoder", source.component_weights["text_encoder"], dtype
        )
        self.tokenizer = load_tokenizer(source.folder)
        return [freeze(encoder, device)]

    @property
    def text_encoder(self) -> Any:
        """The first text encoder."""
        return self.text_encoders[0]

    @property
    def latent_scale(self) -> float:
        """Factor between the VAE's latents and the UNet's."""
        return float(self.vae.config.scaling_factor)

    @property
    def latent_shift(self) -> float:
        """What is taken from the VAE's latents before they are scaled; 0 for Stable Diffusion."""
        return float(self.vae.config.shift_factor or 0.0)

    @property
    def timesteps(self) -> int:
        """Number of timesteps of the schedule."""
        return len(self.alphas_cumprod)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """See `Backbone.encode_images`."""
        mean = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist.mean
        scaled: torch.Tensor = (mean - self.latent_shift) * self.latent_scale
        return scaled.to(self.dtype)

    def encode_text(self, text: str, chunks: int = 1) -> Text:
        """``encoder_hidden_states`` (1, chunks * tokens, width), as Stable Diffusion's own pipeline makes a chunk's."""
        for encoder in self.text_encoders:
            encoder.to(self.device)
        with torch.inference_mode():
            return self.text_states(text, chunks)

    def text_states(self, text: str, chunks: int = 1) -> Text:
        """What `encode_text` returns, with gradients where the caller wants them; for training."""
        encoder = self.text_encoder
        masked = getattr(encoder.config, "use_attention_mask", False)
        states = []
        for tokens in clip_chunks(self.tokenizer, text, self.source.text_tokens, chunks):
            mask = tokens.attention_mask.to(self.device) if masked else None
            states.append(encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0])
        return {"encoder_hidden_states": torch.cat(states, dim=1).to(self.dtype)}

    def offload_text(self) -> None:
        """See `Backbone.offload_text`."""
        for encoder in self.text_encoders:
            encoder.to("cpu")

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """See `Backbone.noised`."""
        return ddpm_noised(clean, noise, timestep, self.alphas_cumprod)

    def stepped(self, noised: torch.Tensor, prediction: torch.Tensor, timestep: int, earlier: int) -> torch.Tensor:
        """See `Backbone.stepped`."""
        return ddim_step(noised, prediction, timestep, earlier, self.alphas_cumprod, self.prediction_type)

    def inputs(
        self, noised: torch.Tensor, timesteps: torch.Tensor, text: Text, height_px: int, width_px: int
    ) -> dict[str, Any]:
        """See `Backbone.inputs`."""
        return {"sample": noised, "timestep": timesteps, **text}

    def controlnet(self, folder: Path, digest: str) -> ControlNetModel:
        """The ControlNet in a folder, loaded once for each digest.

        Raises:
            BadRequestError: if it does not fit the model.
        """
        self._check_open()
        if digest not in self._controlnets:
            weights = weight_files(folder, DIFFUSERS_STEM, allow_pickle=self.source.allow_pickle)
            model = pretrained(ControlNetModel, folder, weights, self.dtype)
            self._controlnets[digest] = freeze(model, self.device)
        return self._controlnets[digest]

    def lora(self, path: Path, digest: str) -> str:
        """Load the LoRA in a file once for each digest and return the name of its adapter; it stays disabled.

        Raises:
            BadRequestError: if it does not fit the model.
        """
        self._check_open()
        return self._adapters.load(path, digest)

    def adapted(self, loras: Sequence[tuple[str, float]]) -> contextlib.AbstractContextManager[None]:
        """Context in which exactly these LoRAs (adapter name, scale) act on the UNet and the text encoder."""
        self._check_open()
        return self._adapters.enabled(loras)

    def ip_adapter(self, path: Path, image_encoder: Path, digest: str) -> None:
        """See `Backbone.ip_adapter`.

        Raises:
            BadRequestError: if it does not fit the model.
        """
        self._check_open()
        self._ip_adapters.load(path, image_encoder, digest)

    def looking(self, digest: str, scale: float) -> contextlib.AbstractContextManager[None]:
        """See `Backbone.looking`."""
        return self._ip_adapters.acting(digest, scale)

    def see(self, digest: str, image: UInt8Array | None) -> torch.Tensor:
        """See `Backbone.see`."""
        return self._ip_adapters.see(digest, image)

    def _drop(self) -> None:
        self._controlnets.clear()
        self._ip_adapters.clear()
        self._adapters.clear()
        self.text_encoders.clear()
        for name in ("unet", "vae"):
            if hasattr(self, name):
                delattr(self, name)

"""Stable Diffusion 1 and 2, loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from featstore.models.adapters import Adapters
from featstore.models.backbones.base import Text
from featstore.models.backbones.latents import LatentBackbone
from featstore.models.backbones.loading import freeze, pretrained, pretrained_text
from featstore.models.backbones.schedules import Diffusion
from featstore.models.backbones.text import clip_chunks
from featstore.models.files import DIFFUSERS_STEM, weight_files
from featstore.models.ip_adapters import IPAdapters
from featstore.models.tokens import load_tokenizer

if TYPE_CHECKING:
    from featstore.datasets.base import UInt8Array
    from featstore.models.families.latents import LatentSource
    from featstore.models.families.stable_diffusion import StableDiffusion


class StableDiffusionBackbone(LatentBackbone):
    """UNet, VAE encoder, text encoder and noise schedule; see `LatentBackbone`.

    ControlNets, LoRAs and IP-Adapters are loaded on demand, once each.
    """

    source: StableDiffusion
    schedule: Diffusion
    part = "unet"
    kind = UNet2DConditionModel

    def __init__(self, source: StableDiffusion, *, device: str, compute_dtype: str) -> None:
        super().__init__(source, device=device, compute_dtype=compute_dtype)
        self._controlnets: dict[str, ControlNetModel] = {}
        self._adapters = Adapters(self._adaptable())
        self._ip_adapters = IPAdapters(self.unet)

    def _adaptable(self) -> dict[str, nn.Module]:
        """What a LoRA can change, by the name that its files give it."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    def _load_text(self, source: LatentSource, dtype: torch.dtype) -> list[nn.Module]:
        self.tokenizer = load_tokenizer(source.folder)
        weights = source.component_weights["text_encoder"]
        return [pretrained_text(CLIPTextModel, source.folder / "text_encoder", weights, dtype)]

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoiser."""
        return self.denoiser

    @property
    def text_encoder(self) -> Any:
        """The first text encoder."""
        return self.text_encoders[0]

    def text_states(self, text: str, chunks: int = 1) -> Text:
        """``encoder_hidden_states`` (1, chunks * tokens, width), as Stable Diffusion's own pipeline makes a chunk's."""
        encoder = self.text_encoder
        masked = getattr(encoder.config, "use_attention_mask", False)
        states = []
        for tokens in clip_chunks(self.tokenizer, text, self.source.text_tokens, chunks):
            mask = tokens.attention_mask.to(self.device) if masked else None
            states.append(encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0])
        return {"encoder_hidden_states": torch.cat(states, dim=1).to(self.dtype)}

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
        super()._drop()

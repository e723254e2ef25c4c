"""Stable Diffusion XL, loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import CLIPTextModelWithProjection

from featstore.models.backbones.base import Text
from featstore.models.backbones.loading import pretrained_text
from featstore.models.backbones.stable_diffusion import StableDiffusionBackbone
from featstore.models.backbones.text import clip_chunks
from featstore.models.backbones.transfer import to_device
from featstore.models.tokens import load_tokenizer

if TYPE_CHECKING:
    from featstore.models.families.latents import LatentSource
    from featstore.models.families.sdxl import StableDiffusionXL


class StableDiffusionXLBackbone(StableDiffusionBackbone):
    """UNet, VAE encoder, two text encoders and noise schedule; see `StableDiffusionBackbone`."""

    source: StableDiffusionXL
    # SDXL's autoencoder overflows in float16, whatever a folder's configuration says of it.
    vae_in_float32 = True

    def _load_text(self, source: LatentSource, dtype: torch.dtype) -> list[nn.Module]:
        self.tokenizer_2 = load_tokenizer(source.folder, "tokenizer_2")
        weights = source.component_weights["text_encoder_2"]
        second = pretrained_text(CLIPTextModelWithProjection, source.folder / "text_encoder_2", weights, dtype)
        return [*super()._load_text(source, dtype), second]

    def _adaptable(self) -> dict[str, nn.Module]:
        return {**super()._adaptable(), "text_encoder_2": self.text_encoders[1]}

    def text_states(self, text: str, chunks: int = 1) -> Text:
        """``encoder_hidden_states`` (1, chunks * tokens, width) and ``text_embeds`` (1, width), as SDXL's own pipeline.

        The first are the hidden states before the last layer of both encoders, side by side (Podell et al., 2023,
        section 2.1), the second the pooled and projected output of the second encoder, of the first chunk.
        """
        states = []
        pooled: torch.Tensor
        for tokenizer, encoder in zip((self.tokenizer, self.tokenizer_2), self.text_encoders, strict=True):
            first = tokenizer is self.tokenizer
            outputs = [
                encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
                for tokens in clip_chunks(tokenizer, text, self.source.text_tokens, chunks, warn=first)
            ]
            states.append(torch.cat([output.hidden_states[-2] for output in outputs], dim=1))
            # Of the first encoder the last hidden state, of the second the pooled text.
            pooled = outputs[0][0]
        embedding = torch.cat(states, dim=-1).to(self.dtype)
        return {"encoder_hidden_states": embedding, "text_embeds": pooled.to(self.dtype)}

    def encode_unguided(self, chunks: int = 1) -> Text:
        """Zeros in the shape of a text: what stands for no text in SDXL's training and in its own pipeline."""
        return {name: torch.zeros_like(value) for name, value in self.encode_text("", chunks).items()}

    def inputs(
        self, noised: torch.Tensor, timesteps: torch.Tensor, text: Text, height_px: int, width_px: int
    ) -> dict[str, Any]:
        """See `Backbone.inputs`; the image is said to be uncropped and of its own size, as the pipeline's default."""
        sizes = [height_px, width_px, 0, 0, height_px, width_px]
        time_ids = to_device(torch.tensor([sizes], dtype=noised.dtype), noised.device).expand(len(noised), -1)
        return {
            "sample": noised,
            "timestep": timesteps,
            "encoder_hidden_states": text["encoder_hidden_states"],
            "added_cond_kwargs": {"text_embeds": text["text_embeds"], "time_ids": time_ids},
        }

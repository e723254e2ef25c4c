"""Stable Diffusion 3 and 3.5, loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from featstore.models.adapters import Adapters
from featstore.models.backbones.base import Text
from featstore.models.backbones.latents import LatentBackbone
from featstore.models.backbones.loading import pretrained_text
from featstore.models.backbones.schedules import Flow
from featstore.models.backbones.text import clip_tokens
from featstore.models.families.sd3 import T5_TOKENS
from featstore.models.families.transformer import TIMESTEPS
from featstore.models.tokens import load_t5_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from featstore.models.families.latents import LatentSource
    from featstore.models.families.sd3 import StableDiffusion3


class StableDiffusion3Backbone(LatentBackbone):
    """Transformer, VAE encoder, two CLIP text encoders and a T5 or none; see `LatentBackbone`."""

    source: StableDiffusion3
    part = "transformer"
    kind = SD3Transformer2DModel

    def __init__(self, source: StableDiffusion3, *, device: str, compute_dtype: str) -> None:
        super().__init__(source, device=device, compute_dtype=compute_dtype)
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        self._adapters = Adapters({"transformer": self.denoiser, **dict(zip(names, self.text_encoders, strict=False))})

    def _load_schedule(self, source: LatentSource, device: torch.device) -> Flow:
        return Flow(TIMESTEPS)

    def _load_text(self, source: LatentSource, dtype: torch.dtype) -> list[nn.Module]:
        names = ["text_encoder", "text_encoder_2"]
        kinds = [CLIPTextModelWithProjection, CLIPTextModelWithProjection]
        self.tokenizers = [load_tokenizer(source.folder, name) for name in ("tokenizer", "tokenizer_2")]
        if "text_encoder_3" in source.component_weights:
            names.append("text_encoder_3")
            kinds.append(T5EncoderModel)
            self.tokenizers.append(load_t5_tokenizer(source.folder, "tokenizer_3"))
        return [
            pretrained_text(kind, source.folder / name, source.component_weights[name], dtype)
            for name, kind in zip(names, kinds, strict=True)
        ]

    def text_states(self, text: str, chunks: int = 1) -> Text:
        """``encoder_hidden_states`` (1, tokens, width), ``pooled_projections`` (1, width of both CLIPs).

        The hidden states before the last of each CLIP side by side, filled up with zeros to T5's width, and then, as
        further tokens, T5's (Esser et al., 2024, section 4): zeros where there is no T5.
        """
        states, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers[:2], self.text_encoders[:2], strict=True):
            tokens = clip_tokens(tokenizer, text, self.source.clip_tokens)
            output = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        width = self.source.transformer_config["joint_attention_dim"]
        clip = torch.cat(states, dim=-1).to(self.dtype)
        clip = functional.pad(clip, (0, width - clip.shape[-1]))
        t5 = torch.zeros((1, T5_TOKENS, width), dtype=self.dtype, device=self.device)
        if self.source.has_t5:
            tokens = clip_tokens(self.tokenizers[2], text, T5_TOKENS)
            # Its padding is not masked, as the model was trained.
            t5 = self.text_encoders[2](tokens.input_ids.to(self.device))[0].to(self.dtype)
        embedding = torch.cat([clip, t5], dim=1)
        return {"encoder_hidden_states": embedding, "pooled_projections": torch.cat(pooled, dim=-1).to(self.dtype)}

    def inputs(
        self, noised: torch.Tensor, timesteps: torch.Tensor, text: Text, height_px: int, width_px: int
    ) -> dict[str, Any]:
        """See `Backbone.inputs`."""
        return {"hidden_states": noised, "timestep": timesteps, **text}

    def lora(self, path: Path, digest: str) -> str:
        """See `Backbone.lora`; of the transformer, the text encoders, or both."""
        self._check_open()
        return self._adapters.load(path, digest)

    def adapted(self, loras: Sequence[tuple[str, float]]) -> contextlib.AbstractContextManager[None]:
        """See `Backbone.adapted`."""
        self._check_open()
        return self._adapters.enabled(loras)

    def _drop(self) -> None:
        self._adapters.clear()
        super()._drop()

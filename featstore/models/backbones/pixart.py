"""PixArt-alpha and PixArt-Sigma, loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import nn
from transformers import T5EncoderModel

from featstore.models.backbones.base import Text
from featstore.models.backbones.latents import LatentBackbone
from featstore.models.backbones.loading import pretrained_text
from featstore.models.backbones.text import clip_tokens
from featstore.models.backbones.transfer import to_device
from featstore.models.families.pixart import cleaned
from featstore.models.tokens import load_t5_tokenizer

if TYPE_CHECKING:
    from featstore.models.families.latents import LatentSource
    from featstore.models.families.pixart import PixArt


class PixArtBackbone(LatentBackbone):
    """Transformer, VAE encoder, T5 and noise schedule; see `LatentBackbone`."""

    source: PixArt
    part = "transformer"
    kind = PixArtTransformer2DModel

    def _load_text(self, source: LatentSource, dtype: torch.dtype) -> list[nn.Module]:
        weights = source.component_weights["text_encoder"]
        self.tokenizer = load_t5_tokenizer(source.folder)
        return [pretrained_text(T5EncoderModel, source.folder / "text_encoder", weights, dtype)]

    def text_states(self, text: str, chunks: int = 1) -> Text:
        """``encoder_hidden_states`` (1, tokens, width), ``encoder_attention_mask`` (1, tokens): 0 is padding."""
        tokens = clip_tokens(self.tokenizer, cleaned(text), self.source.text_tokens)
        mask = tokens.attention_mask.to(self.device)
        (encoder,) = self.text_encoders
        embedding: torch.Tensor = encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
        return {"encoder_hidden_states": embedding.to(self.dtype), "encoder_attention_mask": mask}

    def inputs(
        self, noised: torch.Tensor, timesteps: torch.Tensor, text: Text, height_px: int, width_px: int
    ) -> dict[str, Any]:
        """See `Backbone.inputs`.

        A model that wants the image's size is told the size that it has; the pipeline would first round it to one of a
        list.
        """
        sizes: dict[str, torch.Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.source.sized:
            rows = to_device(torch.tensor([[height_px, width_px, height_px / width_px]]), noised.device)
            rows = rows.to(self.dtype).expand(len(noised), 3)
            sizes = {"resolution": rows[:, :2], "aspect_ratio": rows[:, 2:]}
        return {"hidden_states": noised, "timestep": timesteps, "added_cond_kwargs": sizes, **text}

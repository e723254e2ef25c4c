"""Stable Diffusion 3 and 3.5: transformers with joint attention over image and text. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from featstore.errors import BadRequestError, NotFoundError
from featstore.models.families.transformer import LatentTransformer
from featstore.models.files import TRANSFORMERS_STEM
from featstore.models.transformer_layers import Transformer

if TYPE_CHECKING:
    from featstore.models.backbones.base import Backbone

T5_TOKENS = 256
"""Length of the T5 part of an encoded prompt, as the pipeline has it by default."""
# transformers leaves defaults out of config.json; this is CLIP's.
_CLIP_TOKENS = 77


class StableDiffusion3(LatentTransformer):
    """A Stable Diffusion 3 pipeline folder (SD3Transformer2DModel, AutoencoderKL, two CLIP text encoders, T5 or none).

    It is a rectified flow (Esser et al., 2024): timestep t stands for t / 1000 parts of noise, whatever the shift of
    the folder's schedule, which decides which timesteps a sampler visits.
    """

    components: ClassVar = {
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer": ("CLIPTokenizer",),
        "tokenizer_2": ("CLIPTokenizer",),
        "tokenizer_3": ("T5Tokenizer",),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    }
    optional = frozenset({"text_encoder_3", "tokenizer_3"})
    weighted: ClassVar = {
        **LatentTransformer.weighted,
        "text_encoder_2": TRANSFORMERS_STEM,
        "text_encoder_3": TRANSFORMERS_STEM,
    }
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    needed: ClassVar = {
        **LatentTransformer.needed,
        "transformer": (*LatentTransformer.needed["transformer"], "joint_attention_dim", "pos_embed_max_size"),
    }
    techniques = frozenset({"prompt", "lora", "cfg"})
    unsupported: ClassVar = {
        "controlnet": "ControlNets of Stable Diffusion 3 are not supported in this version",
        "ip-adapter": "IP-Adapters of Stable Diffusion 3 are not supported in this version",
    }
    scheduler = "flow"

    def _read(self) -> None:
        super()._read()
        self._clip_tokens: int = self._config("text_encoder").get("max_position_embeddings", _CLIP_TOKENS)
        if self.has_t5 and "tokenizer_3" in self.left_out:
            raise NotFoundError(f"model {self.name!r} in {self.folder} has a text_encoder_3 without its tokenizer_3")

    @property
    def has_t5(self) -> bool:
        """Whether the folder has the T5 text encoder; zeros stand for it otherwise."""
        return "text_encoder_3" not in self.left_out

    @property
    def clip_tokens(self) -> int:
        """Length of the CLIP part of an encoded prompt, which comes first."""
        return self._clip_tokens

    @property
    def text_tokens(self) -> int:
        """Length of an encoded prompt: CLIP's tokens, then T5's."""
        return self._clip_tokens + T5_TOKENS

    @property
    def shape(self) -> Transformer:
        """What the layers follow from."""
        return self._shape(joint=True, second=tuple(self.transformer_config.get("dual_attention_layers") or ()))

    def check_image_size(self, height_px: int, width_px: int) -> None:
        """Refuse image sizes that the model cannot take; see `ModelSource.check_image_size`."""
        super().check_image_size(height_px, width_px)
        most = self.size_multiple_px * int(self.transformer_config["pos_embed_max_size"])
        for side, value in (("height", height_px), ("width", width_px)):
            if value > most:
                raise BadRequestError(
                    f"image {side} {value} px: model {self.name!r} has positions for {most} px at most",
                    hint=f"nearest: {most} px",
                )

    def tokens(self, text: str, prompt_chunks: int = 1) -> list[str]:
        """See `ModelSource.tokens`."""
        if self.absent is not None:
            raise self.absent
        from featstore.models.tokens import load_t5_tokenizer, load_tokenizer, words

        clip = words(load_tokenizer(self.folder), text, self.clip_tokens)
        if not self.has_t5:
            return [*clip, *[""] * T5_TOKENS]
        return [*clip, *words(load_t5_tokenizer(self.folder, "tokenizer_3"), text, T5_TOKENS)]

    def load(self, device: str = "cpu", compute_dtype: str = "float32") -> Backbone:
        """Load the weights, frozen, onto a device; see `ModelSource.load`."""
        from featstore.models.backbones.sd3 import StableDiffusion3Backbone

        return StableDiffusion3Backbone(self, device=device, compute_dtype=compute_dtype)

"""PixArt-alpha and PixArt-Sigma: transformers that attend to a T5 text encoder. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from featstore.errors import BadRequestError
from featstore.models.families.transformer import LatentTransformer
from featstore.models.transformer_layers import Transformer

if TYPE_CHECKING:
    from featstore.models.backbones.base import Backbone

_CONDITIONED_SAMPLE = 128
"""Latent side from which on, by default, models are told the size of their images."""


class PixArt(LatentTransformer):
    """A PixArt pipeline folder (PixArtTransformer2DModel, AutoencoderKL, T5EncoderModel)."""

    components: ClassVar = {
        # The published folders say Transformer2DModel, from before diffusers had a class for it.
        "transformer": ("PixArtTransformer2DModel", "Transformer2DModel"),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("T5EncoderModel",),
        "tokenizer": ("T5Tokenizer",),
    }
    tokenizers = ("tokenizer",)
    techniques = frozenset({"prompt", "cfg"})
    unsupported: ClassVar = {
        "lora": "diffusers neither writes nor reads LoRAs of PixArt, so there is no form of them to take",
        "controlnet": "ControlNets of PixArt are not supported in this version",
        "ip-adapter": "there are no IP-Adapters for PixArt",
    }
    max_tokens: ClassVar[int]
    """Length of an encoded prompt, as the pipeline has it."""

    def _read(self) -> None:
        super()._read()
        config = self.transformer_config
        norm = config.get("norm_type", "ada_norm_single")
        if norm != "ada_norm_single":
            raise BadRequestError(f"the transformer in {self.folder} has norm_type = {norm!r}: it is no PixArt")
        latent, out = config["in_channels"], config.get("out_channels") or config["in_channels"]
        if out not in (latent, 2 * latent):
            raise BadRequestError(
                f"the transformer in {self.folder} makes {out} channels of {latent}; it should be as many, or as many "
                "again for the variance"
            )

    @property
    def text_tokens(self) -> int:
        """Length of an encoded prompt."""
        return self.max_tokens

    @property
    def sized(self) -> bool:
        """Whether the transformer is told height, width and aspect ratio of the image."""
        said = self.transformer_config.get("use_additional_conditions")
        return self.transformer_config["sample_size"] == _CONDITIONED_SAMPLE if said is None else bool(said)

    @property
    def shape(self) -> Transformer:
        """What the layers follow from."""
        return self._shape(joint=False)

    def tokens(self, text: str, prompt_chunks: int = 1) -> list[str]:
        """See `ModelSource.tokens`."""
        if self.absent is not None:
            raise self.absent
        from featstore.models.tokens import load_t5_tokenizer, words

        return words(load_t5_tokenizer(self.folder), cleaned(text), self.text_tokens)

    def load(self, device: str = "cpu", compute_dtype: str = "float32") -> Backbone:
        """Load the weights, frozen, onto a device; see `ModelSource.load`."""
        from featstore.models.backbones.pixart import PixArtBackbone

        return PixArtBackbone(self, device=device, compute_dtype=compute_dtype)


class PixArtAlpha(PixArt):
    """PixArt-alpha (Chen et al., 2023): 120 tokens of text."""

    max_tokens = 120


class PixArtSigma(PixArt):
    """PixArt-Sigma (Chen et al., 2024): 300 tokens of text."""

    max_tokens = 300


def cleaned(text: str) -> str:
    """A prompt as PixArt's pipelines give it to their tokenizer, unless they are told to clean it more."""
    return text.lower().strip()

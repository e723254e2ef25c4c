"""Stable Diffusion 1 and 2: a UNet that attends to one CLIP text encoder. No torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from featstore.errors import BadRequestError
from featstore.models.families.latents import LatentSource
from featstore.models.files import DIFFUSERS_STEM
from featstore.models.layers import Tap, presets, taps

if TYPE_CHECKING:
    from featstore.models.backbones.base import Backbone

_PLAIN_UNET: dict[str, Any] = {
    "addition_embed_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "time_cond_proj_dim": None,
    "dual_cross_attention": False,
}


class StableDiffusion(LatentSource):
    """A Stable Diffusion pipeline folder (UNet2DConditionModel, AutoencoderKL, CLIPTextModel)."""

    components: ClassVar = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer",),
    }
    weighted: ClassVar = {"unet": DIFFUSERS_STEM, **LatentSource.weighted}
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    needed: ClassVar = {
        "unet": (
            "sample_size",
            "in_channels",
            "out_channels",
            "block_out_channels",
            "down_block_types",
            "up_block_types",
            "cross_attention_dim",
        ),
        **LatentSource.needed,
    }
    techniques = frozenset({"prompt", "controlnet", "lora", "ip-adapter", "cfg"})
    chunked_text = True
    plain_unet: ClassVar[Mapping[str, Any]] = _PLAIN_UNET
    """Values of the UNet's configuration that this family has; others are other models."""

    def _read(self) -> None:
        self.unet_config = self._config("unet")
        super()._read()
        self._check_unet()
        # transformers leaves defaults out of config.json; 77 is CLIP's.
        self._text_tokens: int = self._config("text_encoder").get("max_position_embeddings", 77)
        # Refuses a UNet of other blocks.
        _ = self.presets

    def _check_unet(self) -> None:
        config, latent = self.unet_config, self.vae_config["latent_channels"]
        if config["in_channels"] != latent:
            raise BadRequestError(
                f"the UNet in {self.folder} takes {config['in_channels']} channels, its autoencoder makes {latent}: "
                "an inpainting or depth model, which has inputs that an image alone does not give"
            )
        for key, plain in self.plain_unet.items():
            if config.get(key, plain) != plain:
                raise BadRequestError(
                    f"the UNet in {self.folder} has {key} = {config[key]!r}; this version takes {plain!r} only"
                )

    @property
    def text_tokens(self) -> int:
        """Length of an encoded prompt."""
        return self._text_tokens

    @property
    def denoiser_config(self) -> Mapping[str, Any]:
        """Content of the UNet's ``config.json``."""
        return self.unet_config

    @property
    def size_multiple_px(self) -> int:
        """Image sides are multiples of this, so that every level of the UNet halves evenly."""
        return int(self.latent_factor * 2 ** (len(self.unet_config["block_out_channels"]) - 1))

    @functools.cached_property
    def taps(self) -> Mapping[str, Tap]:
        """All layers by name."""
        return taps(self.unet_config, text_tokens=self.text_tokens)

    @functools.cached_property
    def presets(self) -> Mapping[str, tuple[str, ...]]:
        """``legacy``, ``practical`` where the UNet has its layers, ``full``."""
        return presets(self.unet_config, text_tokens=self.text_tokens)

    def load(self, device: str = "cpu", compute_dtype: str = "float32") -> Backbone:
        """Load the weights, frozen, onto a device; see `ModelSource.load`."""
        from featstore.models.backbones.stable_diffusion import StableDiffusionBackbone

        return StableDiffusionBackbone(self, device=device, compute_dtype=compute_dtype)

"""Stable Diffusion XL: a UNet that attends to two CLIP text encoders and is told the image's size. No torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from featstore.errors import BadRequestError
from featstore.models.families.stable_diffusion import StableDiffusion
from featstore.models.files import TRANSFORMERS_STEM, read_json
from featstore.models.layers import presets

if TYPE_CHECKING:
    from featstore.models.backbones.base import Backbone

TIME_IDS = 6
"""Numbers that the UNet is told of an image: height and width of the original, of the crop's corner, of the result."""

_PRACTICAL = (
    "up-level0-repeat0-vit-block7-out",
    "up-level0-repeat0-vit-block5-out",
    "up-level1-repeat0-vit-block0-cross-q",
    "up-level1-repeat0-vit-block0-out",
)
# transformers leaves defaults out of config.json; these are CLIPTextConfig's.
_CLIP_DEFAULTS = {"hidden_size": 512, "projection_dim": 512, "max_position_embeddings": 77}


class StableDiffusionXL(StableDiffusion):
    """An SDXL pipeline folder: base models and what has their shape; the refiner is refused.

    ``text_encoder`` is a CLIPTextModel, ``text_encoder_2`` a CLIPTextModelWithProjection.
    """

    components: ClassVar = {
        **StableDiffusion.components,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": ("CLIPTokenizer",),
    }
    weighted: ClassVar = {**StableDiffusion.weighted, "text_encoder_2": TRANSFORMERS_STEM}
    tokenizers = ("tokenizer", "tokenizer_2")
    needed: ClassVar = {
        **StableDiffusion.needed,
        "unet": (
            *StableDiffusion.needed["unet"],
            "addition_embed_type",
            "addition_time_embed_dim",
            "projection_class_embeddings_input_dim",
        ),
    }
    plain_unet: ClassVar[Mapping[str, Any]] = {**StableDiffusion.plain_unet, "addition_embed_type": "text_time"}

    def _check_components(self) -> None:
        if self.folder.is_dir():
            index = read_json(self.folder / "model_index.json", f"model {self.name!r}")
            scored = index.get("requires_aesthetics_score")
            if scored or index.get("text_encoder") in (None, [None, None]):
                what = "wants an aesthetic score" if scored else "has no first text encoder"
                raise BadRequestError(
                    f"model {self.name!r} in {self.folder} {what}: SDXL's refiner, which finishes what a base model "
                    "began, gives no features of an image alone",
                    hint="use the base model, e.g. stabilityai/stable-diffusion-xl-base-1.0",
                )
        super()._check_components()

    def _read(self) -> None:
        super()._read()
        self._check_text()
        self._check_latents()

    def _check_text(self) -> None:
        """The UNet's widths must be those of the two text encoders together."""
        first, second = (_CLIP_DEFAULTS | self._config(name) for name in ("text_encoder", "text_encoder_2"))
        tokens = [config["max_position_embeddings"] for config in (first, second)]
        if tokens[0] != tokens[1]:
            raise BadRequestError(f"the text encoders in {self.folder} take {tokens[0]} and {tokens[1]} tokens")
        added = TIME_IDS * self.unet_config["addition_time_embed_dim"] + second["projection_dim"]
        for key, made in (
            ("cross_attention_dim", first["hidden_size"] + second["hidden_size"]),
            ("projection_class_embeddings_input_dim", added),
        ):
            if self.unet_config[key] != made:
                raise BadRequestError(
                    f"the UNet in {self.folder} has {key} = {self.unet_config[key]!r}, but its text encoders and "
                    f"{TIME_IDS} sizes of the image make {made}"
                )

    def _check_latents(self) -> None:
        """Models of continuous noise levels (EDM) are noised and fed in another way."""
        schedule = read_json(self.folder / "scheduler" / "scheduler_config.json", f"model {self.name!r}")
        kind = str(schedule.get("_class_name"))
        if kind.startswith("EDM") or self.vae_config.get("latents_mean") is not None:
            raise BadRequestError(
                f"model {self.name!r} in {self.folder} is of the EDM kind (scheduler {kind}), whose noise has no "
                "timesteps; SDXL models with a DDPM schedule are taken"
            )

    @functools.cached_property
    def presets(self) -> Mapping[str, tuple[str, ...]]:
        """``legacy``, ``practical`` (the seed code's choice for SDXL) where the UNet has its layers, ``full``."""
        return presets(self.unet_config, text_tokens=self.text_tokens, practical=_PRACTICAL)

    def load(self, device: str = "cpu", compute_dtype: str = "float32") -> Backbone:
        """Load the weights, frozen, onto a device; see `ModelSource.load`."""
        from featstore.models.backbones.sdxl import StableDiffusionXLBackbone

        return StableDiffusionXLBackbone(self, device=device, compute_dtype=compute_dtype)

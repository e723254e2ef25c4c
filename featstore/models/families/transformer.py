"""What transformers on an autoencoder's latents have in common. No torch."""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from featstore.errors import BadRequestError
from featstore.models.files import DIFFUSERS_STEM, TRANSFORMERS_STEM, read_json
from featstore.models.layers import Tap
from featstore.models.source import ModelSource
from featstore.models.transformer_layers import Transformer, presets, taps

TIMESTEPS = 1000


class LatentTransformer(ModelSource):
    """A pipeline folder with a ``transformer`` of patches in place of a UNet, and an AutoencoderKL."""

    weighted: ClassVar[Mapping[str, str]] = {
        "transformer": DIFFUSERS_STEM,
        "vae": DIFFUSERS_STEM,
        "text_encoder": TRANSFORMERS_STEM,
    }
    needed: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "transformer": (
            "num_attention_heads",
            "attention_head_dim",
            "num_layers",
            "in_channels",
            "patch_size",
            "sample_size",
        ),
        "vae": ("latent_channels", "block_out_channels"),
    }

    def _read(self) -> None:
        self.transformer_config = self._config("transformer")
        self.vae_config = self._config("vae")
        self.scheduler_config = read_json(
            self.component_folder("scheduler") / "scheduler_config.json", f"model {self.name!r}, scheduler"
        )
        inner, latent = self.transformer_config["in_channels"], self.vae_config["latent_channels"]
        if inner != latent:
            raise BadRequestError(
                f"the transformer in {self.folder} takes {inner} channels, its autoencoder makes {latent}: a model "
                "with inputs that an image alone does not give"
            )
        steps = self.scheduler_config.get("num_train_timesteps", TIMESTEPS)
        if steps != TIMESTEPS:
            raise BadRequestError(
                f"the schedule in {self.folder} has {steps} timesteps; this version takes {TIMESTEPS}"
            )

    @property
    @abc.abstractmethod
    def shape(self) -> Transformer:
        """What the layers follow from."""

    @property
    def denoiser_config(self) -> Mapping[str, Any]:
        """Content of the transformer's ``config.json``."""
        return self.transformer_config

    @property
    def latent_channels(self) -> int:
        """Channels of the autoencoder's latents."""
        return int(self.vae_config["latent_channels"])

    @property
    def latent_factor(self) -> int:
        """Image side / latent side."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def size_multiple_px(self) -> int:
        """Image sides are multiples of this: whole patches of latents."""
        return int(self.latent_factor * self.transformer_config["patch_size"])

    @property
    def default_image_size_px(self) -> int:
        """Side of the images that the model was trained on."""
        return int(self.transformer_config["sample_size"] * self.latent_factor)

    @functools.cached_property
    def taps(self) -> Mapping[str, Tap]:
        """All layers by name."""
        return taps(self.shape)

    @functools.cached_property
    def presets(self) -> Mapping[str, tuple[str, ...]]:
        """``legacy`` and ``full``; see `featstore.models.transformer_layers.presets`."""
        return presets(self.shape)

    def _shape(self, *, joint: bool, second: tuple[int, ...] = ()) -> Transformer:
        config = self.transformer_config
        return Transformer(
            blocks=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            latent_channels=config["in_channels"],
            patch=config["patch_size"],
            text_tokens=self.text_tokens,
            joint=joint,
            second=second,
        )

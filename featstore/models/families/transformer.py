"""What transformers on an autoencoder's latents have in common. No torch."""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from featstore.errors import BadRequestError
from featstore.models.families.latents import LatentSource
from featstore.models.files import DIFFUSERS_STEM, read_json
from featstore.models.layers import Tap
from featstore.models.transformer_layers import Transformer, presets, taps

TIMESTEPS = 1000


class LatentTransformer(LatentSource):
    """A pipeline folder with a ``transformer`` of patches in place of a UNet, and an AutoencoderKL."""

    weighted: ClassVar = {"transformer": DIFFUSERS_STEM, **LatentSource.weighted}
    needed: ClassVar = {
        "transformer": (
            "num_attention_heads",
            "attention_head_dim",
            "num_layers",
            "in_channels",
            "patch_size",
            "sample_size",
        ),
        **LatentSource.needed,
    }

    def _read(self) -> None:
        self.transformer_config = self._config("transformer")
        super()._read()
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
    def size_multiple_px(self) -> int:
        """Image sides are multiples of this: whole patches of latents."""
        return int(self.latent_factor * self.transformer_config["patch_size"])

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

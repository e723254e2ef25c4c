"""What pipelines on an autoencoder's latents have in common. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from featstore.models.files import DIFFUSERS_STEM, TRANSFORMERS_STEM
from featstore.models.source import ModelSource


class LatentSource(ModelSource):
    """A pipeline folder with an AutoencoderKL, whose latents are noised, and at least one text encoder."""

    weighted: ClassVar[Mapping[str, str]] = {"vae": DIFFUSERS_STEM, "text_encoder": TRANSFORMERS_STEM}
    needed: ClassVar[Mapping[str, tuple[str, ...]]] = {"vae": ("latent_channels", "block_out_channels")}

    def _read(self) -> None:
        self.vae_config = self._config("vae")

    @property
    def latent_channels(self) -> int:
        """Channels of the autoencoder's latents."""
        return int(self.vae_config["latent_channels"])

    @property
    def latent_factor(self) -> int:
        """Image side / latent side."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def default_image_size_px(self) -> int:
        """Side of the images that the model was trained on."""
        return int(self.denoiser_config["sample_size"] * self.latent_factor)

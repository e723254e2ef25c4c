"""Unconditional DDPMs: a UNet of pixels, without autoencoder and text. No torch.

The folder is one that diffusers' ``DDPMPipeline`` (or ``DDIMPipeline``) saved, with ``unet/`` and ``scheduler/``, or
an early one with all files side by side. ``featstore convert-ddpm`` makes such a folder of guided-diffusion's
checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from featstore.errors import BadRequestError
from featstore.models.files import DIFFUSERS_STEM, read_json
from featstore.models.layers import Tap
from featstore.models.source import ModelSource
from featstore.models.unconditional_layers import presets, taps

if TYPE_CHECKING:
    from featstore.models.backbones.base import Backbone

TIMESTEPS = 1000
_PREDICTIONS = ("epsilon", "v_prediction")
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "in_channels": (3,),
    "out_channels": (3, 6),
    "center_input_sample": (False,),
    "time_embedding_type": ("positional", "learned"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet", None),
    "upsample_type": ("conv", "resnet", None),
}
"""Values of the UNet's configuration that are those of a DDPM of RGB pixels in [-1, 1]; the first is the default."""


class DDPM(ModelSource):
    """A DDPM pipeline folder (UNet2DModel). It denoises the pixels themselves, in [-1, 1], and takes no text."""

    components: ClassVar = {"unet": ("UNet2DModel",)}
    weighted: ClassVar = {"unet": DIFFUSERS_STEM}
    tokenizers = ()
    needed: ClassVar = {
        "unet": (
            "sample_size",
            "in_channels",
            "out_channels",
            "block_out_channels",
            "down_block_types",
            "up_block_types",
        )
    }
    techniques = frozenset()

    def _read(self) -> None:
        self.unet_config = self._config("unet")
        for key, allowed in _ALLOWED.items():
            if self.unet_config.get(key, allowed[0]) not in allowed:
                raise BadRequestError(
                    f"the UNet in {self.folder} has {key} = {self.unet_config[key]!r}; unconditional DDPMs of RGB "
                    f"images have {' or '.join(repr(value) for value in allowed)}"
                )
        self._check_schedule()
        # Refuses a UNet of other blocks.
        _ = self.presets

    def _check_schedule(self) -> None:
        path = self.component_folder("scheduler") / "scheduler_config.json"
        schedule = read_json(path, f"model {self.name!r}, scheduler")
        kind = schedule.get("_class_name")
        if schedule.get("trained_betas") is None and schedule.get("beta_start") is None:
            raise BadRequestError(f"{path} ({kind}) has no betas: it is no schedule of a DDPM")
        steps = schedule.get("num_train_timesteps", TIMESTEPS)
        if steps != TIMESTEPS:
            raise BadRequestError(f"{path} has {steps} timesteps; this version takes {TIMESTEPS}")
        predicts = schedule.get("prediction_type", _PREDICTIONS[0])
        if predicts not in _PREDICTIONS:
            raise BadRequestError(f"{path} says that {predicts!r} is predicted; known: {', '.join(_PREDICTIONS)}")

    @property
    def text_tokens(self) -> int:
        """0: there is no text."""
        return 0

    @property
    def denoiser_config(self) -> Mapping[str, Any]:
        """Content of the UNet's ``config.json``."""
        return self.unet_config

    @property
    def latent_channels(self) -> int:
        """3: RGB."""
        return int(self.unet_config["in_channels"])

    @property
    def latent_factor(self) -> int:
        """1: pixels are noised themselves."""
        return 1

    @property
    def size_multiple_px(self) -> int:
        """Image sides are multiples of this, so that every level of the UNet halves evenly."""
        return int(2 ** (len(self.unet_config["block_out_channels"]) - 1))

    @property
    def default_image_size_px(self) -> int:
        """Side of the images that the model was trained on; the longer one."""
        size = self.unet_config["sample_size"]
        return int(max(size) if isinstance(size, list | tuple) else size)

    @property
    def default_layers(self) -> str:  # type: ignore[override]
        """``ddpm-segmentation`` where the UNet has its blocks, else ``legacy``."""
        return next(iter(self.presets))

    @functools.cached_property
    def taps(self) -> Mapping[str, Tap]:
        """All layers by name."""
        return taps(self.unet_config)

    @functools.cached_property
    def presets(self) -> Mapping[str, tuple[str, ...]]:
        """``ddpm-segmentation`` where the UNet is deep enough, ``legacy``, ``full``."""
        return presets(self.unet_config)

    def load(self, device: str = "cpu", compute_dtype: str = "float32") -> Backbone:
        """Load the weights, frozen, onto a device; see `ModelSource.load`."""
        from featstore.models.backbones.ddpm import DDPMBackbone

        return DDPMBackbone(self, device=device, compute_dtype=compute_dtype)

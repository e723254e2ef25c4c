"""A head that labels whole images: UPerNet on amalgamated maps, each at its own size.

UPerNet: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, in the implementation of
`transformers`. Its use on amalgamated diffusion features: Meng et al., NeurIPS 2024 (arXiv 2410.06719).

B images, K runs in the bucket, C channels, H W map height and width, h w height and width of the label grid,
n assigners, c channels of a weight (1, or C where it is per channel).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from featstore.errors import BadRequestError
from featstore.heads.base import Head
from featstore.heads.features import FeaturesSpec
from featstore.heads.head import PixelSpec
from featstore.heads.initial import draw_parameters
from featstore.heads.map_amalgamation import MapAmalgamation
from featstore.heads.map_standardise import MapStandardise
from featstore.heads.stream import Maps

_WIDEST = 512


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UPerNetHeadConfig:
    """How a UPerNet head is built and trained; the defaults are the paper's, or its public configuration's."""

    assigners: int = 2
    """Assigners n a layer that amalgamate a bucket of two runs or more; a single run has none."""
    assigner_hidden: int = 16
    """Hidden channels of an assigner."""
    per_channel: bool = False
    """Whether an assigner weighs each channel apart, as the authors' code does, and not each run as a whole."""
    gamma1: float = 1e-3
    """Factor of the regulariser's sparsity term; the paper tunes it per data set."""
    gamma2: float = 1e-3
    """Factor of the regulariser's diversity term; the paper tunes it per data set."""
    width: int | None = None
    """Channels inside UPerNet; None: 512, or as many as the widest layer has where that is less."""
    pool_scales: tuple[int, ...] = (1, 2, 3)
    """Sides that the coarsest level is pooled to."""
    lovasz: float = 1.0
    """Factor of the Lovász-softmax loss beside cross-entropy; 0 leaves it out."""
    learning_rate: float = 1.6e-4
    """Step size of AdamW at the start."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    decay_power: float = 0.9
    """The step size falls as (1 - step / steps) to this power; 0 keeps it constant."""
    batch_size: int = 4
    """Images of a step."""
    steps: int = 80_000
    """Steps, where ``max_epochs`` are not over before."""
    max_epochs: int = 120
    """Passes over the training images at most, for small data sets: 80,000 steps of 4 on CityScapes are 108."""
    max_steps: int | None = None
    """Steps to take instead of what ``steps`` and ``max_epochs`` come to; None: those."""
    statistics_images: int = 1024
    """Training images at least, where there are as many, that means and deviations of channels are taken from."""

    def __post_init__(self) -> None:
        """Refuse values that no training can have."""
        for field, least in (
            ("assigners", 1),
            ("assigner_hidden", 1),
            ("batch_size", 2),
            ("steps", 1),
            ("max_epochs", 1),
            ("statistics_images", 1),
        ):
            if getattr(self, field) < least:
                raise BadRequestError(f"{field} {getattr(self, field)} must be {least} or more")
        for field in ("width", "max_steps"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise BadRequestError(f"{field} {getattr(self, field)} must be 1 or more")
        if not self.pool_scales or min(self.pool_scales) < 1:
            raise BadRequestError(f"pool_scales {self.pool_scales} must be positive numbers")
        if not self.learning_rate > 0:
            raise BadRequestError(f"learning_rate {self.learning_rate} must be positive")
        for field in ("gamma1", "gamma2", "lovasz", "weight_decay", "decay_power"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) >= 0):
                raise BadRequestError(f"{field} {getattr(self, field)} must be 0 or more")

    def width_for(self, features: FeaturesSpec) -> int:
        """Channels inside UPerNet for these features."""
        if self.width is not None:
            return self.width
        return min(_WIDEST, max(shape[0] for shape in features.layers.values()))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MapPrediction:
    """What a head of whole maps says about B images."""

    labels: npt.NDArray[np.uint8]
    """(B, h, w) uint8: the most probable class."""
    uncertainty: npt.NDArray[np.float32]
    """(B, h, w) float32: entropy of the classes' probabilities in nats, 0..ln(classes)."""
    weights: dict[str, Tensor]
    """Layer name to (B, n, K, c, H, W) float32: what the assigners chose; empty for one run."""


class UPerNetHead(Head):
    """Amalgamation of every layer at its own size, and UPerNet on one level a size."""

    kind = "upernet"

    def __init__(self, spec: PixelSpec, config: UPerNetHeadConfig, generator: torch.Generator) -> None:
        """A head with initial parameters.

        Args:
            spec: features, classes and label grid.
            config: sizes.
            generator: of the initial parameters, on the CPU.
        """
        self.spec = spec
        self.config = config
        self.standardise = MapStandardise(spec.features)
        self.amalgamation = MapAmalgamation(
            spec.features.layers,
            runs=len(spec.features.runs),
            assigners=config.assigners,
            per_channel=config.per_channel,
            hidden=config.assigner_hidden,
            generator=generator,
        )
        self.levels = _levels(spec.features)
        inputs = {name: self.amalgamation.channels(name) for name in spec.features.layers}
        inputs |= {name: shape[0] for name, shape in spec.features.beside_layers.items()}
        widths = [sum(inputs[name] for name in names) for names in self.levels]
        self.decoder = _decoder(widths, config.width_for(spec.features), config.pool_scales, len(spec.classes))
        draw_parameters(self.decoder, generator)
        self.train(False)

    @property
    @override
    def features(self) -> FeaturesSpec:
        return self.spec.features

    @property
    @override
    def facts(self) -> dict[str, Any]:
        return self.spec.facts

    @property
    @override
    def modules(self) -> dict[str, torch.nn.Module]:
        return {"standardise": self.standardise, "amalgamation": self.amalgamation, "decoder": self.decoder}

    @classmethod
    @override
    def build(cls, features: FeaturesSpec, facts: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        made = UPerNetHeadConfig(**{**config, "pool_scales": tuple(config["pool_scales"])})
        return cls(PixelSpec.of(features, facts), made, torch.Generator().manual_seed(0))

    def train(self, training: bool = True) -> None:
        """Switch to training or, with False, to evaluation mode."""
        for module in self.modules.values():
            module.train(training)

    def logits(self, maps: Maps) -> tuple[Tensor, dict[str, Tensor]]:
        """Class scores of images, with gradients for all parameters.

        Args:
            maps: B images with all layers of ``features``, on any device.

        Returns:
            (B, classes, h, w) float32 on the head's device, upsampled bilinearly to the label grid, and the
            assigners' weights, layer name to (B, n, K, c, H, W), none for one run.
        """
        layers, beside = self.standardise(maps)
        mixed = self.amalgamation(layers)
        inputs = {**beside, **mixed.layers}
        scores = self.decoder([torch.cat([inputs[name] for name in names], 1) for names in self.levels])
        whole = functional.interpolate(scores, self.spec.size, mode="bilinear", align_corners=False)
        return whole, mixed.weights

    @torch.inference_mode()
    def predict_maps(self, maps: Maps) -> MapPrediction:
        """Label images from their maps, which are standardised here."""
        logits, weights = self.logits(maps)
        probabilities = logits.softmax(1)
        return MapPrediction(
            labels=probabilities.argmax(1).to(torch.uint8).cpu().numpy(),
            uncertainty=torch.special.entr(probabilities).sum(1).cpu().numpy(),
            weights=weights,
        )


def _levels(features: FeaturesSpec) -> list[list[str]]:
    """Names of the layers of each size, those beside the bucket after the amalgamated ones; the finest size first."""
    sizes: dict[tuple[int, int], list[str]] = {}
    for name, shape in [*features.layers.items(), *features.beside_layers.items()]:
        sizes.setdefault(shape[1:], []).append(name)
    return [sizes[size] for size in sorted(sizes, key=lambda size: size[0] * size[1], reverse=True)]


def _decoder(widths: list[int], width: int, pool_scales: tuple[int, ...], classes: int) -> torch.nn.Module:
    """UPerNet's decoder without its backbone, for levels of ``widths`` channels."""
    from transformers import UperNetConfig as Config
    from transformers.models.upernet.modeling_upernet import UperNetHead as Decoder

    config = Config(hidden_size=width, pool_scales=list(pool_scales), num_labels=classes)
    made: torch.nn.Module = Decoder(config, widths)
    return made

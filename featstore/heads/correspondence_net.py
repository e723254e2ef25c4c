"""Maps whose nearest neighbours correspond: amalgamated and, for ``conv``, convolved once more.

B images, K runs in the bucket, C channels of a layer, H W its height and width, n assigners, D channels
of a layer of the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from featstore.errors import BadRequestError, unknown_name
from featstore.heads.features import FeaturesSpec
from featstore.heads.initial import draw_parameters
from featstore.heads.map_amalgamation import MapAmalgamation, MapResult
from featstore.heads.stream import WINDOW_BYTES

NEGATIVES = ("grid", "points")
_TEMPERATURE = 0.07
_MOST_SCALE = 100.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorrespondenceConfig:
    """How a correspondence head is built and trained; the defaults are the paper's where it gives them."""

    conv: bool = True
    """Whether a 3x3 convolution follows each assigner (``conv``), or none (``nn``)."""
    assigners: int = 3
    """Assigners n that amalgamate a bucket of two runs or more; a single run has none."""
    per_channel: bool = False
    """Whether an assigner weighs each channel apart, and not each run as a whole."""
    assigner_hidden: int = 16
    """Hidden channels of an assigner."""
    conv_channels: int = 128
    """Channels that the convolution after each assigner gives for each layer."""
    grid: tuple[int, int] | None = None
    """(h, w) positions of the target that are searched; None: twice those of the largest map on each side, between
    which its vectors are interpolated (on toyhorse 1.6 points of PCK better than the map's own positions)."""
    negatives: str = "grid"
    """What a point is told apart from in training: ``grid``, all positions of the other image's largest map, or
    ``points``, the other points of the pair (on toyhorse 3.6 points of PCK worse)."""
    gamma1: float = 1e-3
    """Factor of the regulariser's sparsity term; the paper tunes it per data set."""
    gamma2: float = 1e-3
    """Factor of the regulariser's diversity term; the paper tunes it per data set."""
    learning_rate: float = 5e-4
    """Step size of AdamW."""
    weight_decay: float = 0.01
    """Of AdamW."""
    epochs: int = 2
    """Epochs; in each, pairs are drawn without repetition."""
    epoch_steps: int = 5000
    """Steps of an epoch at most; each is one pair."""
    image_steps: int = 5
    """Steps of an epoch at most for each training image, whatever the number of pairs: few images make many pairs,
    and are soon known by heart. 5 is what 5,000 steps are on the 1,000 training images of SPair-71k."""
    mix_steps: int = 1000
    """Pairs that are drawn together and read in the order of their blocks: more need fewer reads, fewer mix better."""
    mirror: float = 0.0
    """Share of the steps in which the target is mirrored, points and MAPS: an approximation, because a model's
    features of a mirrored image are not its mirrored features. Without a convolution or an assigner it changes
    nothing: vectors stay what they are, at mirrored places. Not for points that are numbered and not named."""
    max_steps: int | None = None
    """Steps at most, for quick runs; None: no limit but ``epochs``."""
    window_bytes: int = WINDOW_BYTES
    """Bytes of maps that are held while pairs are read."""

    def __post_init__(self) -> None:
        """Refuse values that no training can have."""
        counts = (
            "assigners",
            "assigner_hidden",
            "conv_channels",
            "epochs",
            "epoch_steps",
            "image_steps",
            "mix_steps",
            "window_bytes",
        )
        for field in counts:
            if getattr(self, field) < 1:
                raise BadRequestError(f"{field} {getattr(self, field)} must be 1 or more")
        if self.max_steps is not None and self.max_steps < 1:
            raise BadRequestError(f"max_steps {self.max_steps} must be 1 or more")
        if not self.learning_rate > 0:
            raise BadRequestError(f"learning_rate {self.learning_rate} must be positive")
        for field in ("gamma1", "gamma2", "weight_decay"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) >= 0):
                raise BadRequestError(f"{field} {getattr(self, field)} must be 0 or more")
        if not 0 <= self.mirror <= 1:
            raise BadRequestError(f"mirror {self.mirror} must be in 0..1")
        if self.negatives not in NEGATIVES:
            raise unknown_name("kind of negatives", self.negatives, NEGATIVES)
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise BadRequestError(f"grid {self.grid} must be two positive numbers")

    def trains(self, runs: int) -> bool:
        """Whether a head on this many runs has anything to train: the nearest neighbours of one run have not."""
        return self.conv or runs > 1


class CorrespondenceNet(nn.Module):
    """Assigners (for two runs or more), a 3x3 convolution after each (for ``conv``), and the temperature.

    A layer that stands beside the bucket has no assigner; for ``conv`` it has a convolution of its own.
    """

    def __init__(self, spec: FeaturesSpec, config: CorrespondenceConfig, generator: torch.Generator) -> None:
        super().__init__()
        runs = len(spec.runs)
        self.amalgamation = MapAmalgamation(
            spec.layers,
            runs=runs,
            assigners=config.assigners,
            per_channel=config.per_channel,
            hidden=config.assigner_hidden,
            generator=generator,
        )
        self.layers = tuple(spec.layers)
        self.beside = tuple(spec.beside_layers)
        # by place and not by name: a module's name must not hold a dot, a layer's may
        self.convs = nn.ModuleList()
        if config.conv:
            groups = config.assigners if runs > 1 else 1
            for name in self.layers:
                channels, width = self.amalgamation.channels(name), groups * config.conv_channels
                self.convs.append(nn.Conv2d(channels, width, 3, padding=1, groups=groups))
            for channels, _, _ in spec.beside_layers.values():
                self.convs.append(nn.Conv2d(channels, config.conv_channels, 3, padding=1))
            draw_parameters(self.convs, generator)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(_TEMPERATURE)))

    def forward(self, layers: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> MapResult:
        """The maps that are compared, each at its own size.

        Args:
            layers: layer name to (B, K, C, H, W) float32, standardised.
            beside: ``RUN/LAYER`` to (B, C, H, W) float32, standardised.

        Returns:
            Layers (B, D, H, W) float32, those beside the bucket among them, and the assigners' weights.
        """
        mixed = self.amalgamation(layers)
        maps = {**mixed.layers, **{name: beside[name] for name in self.beside}}
        if len(self.convs):
            maps = {name: conv(value) for conv, (name, value) in zip(self.convs, maps.items(), strict=True)}
        return MapResult(maps, mixed.weights)

    @property
    def scale(self) -> Tensor:
        """() float32 factor of the cosines in the loss, 1 / temperature, 100 at most."""
        return self.log_scale.exp().clamp(max=_MOST_SCALE)

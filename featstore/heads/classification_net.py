"""The network of a classification head: amalgamated maps, pooled to one vector an image, to class scores.

B images, K runs in the bucket, C channels of a layer, H W its height and width, n assigners, D length of an
image's vector, c classes.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from featstore.heads.features import FeaturesSpec
from featstore.heads.initial import draw_parameters
from featstore.heads.map_amalgamation import MapAmalgamation
from featstore.heads.map_standardise import MapStandardise
from featstore.heads.standardise import Standardise
from featstore.heads.stream import Maps


class ClassificationNet(nn.Module, abc.ABC):
    """Standardised maps, amalgamated, to class scores, by way of one vector an image."""

    def __init__(self, features: FeaturesSpec, amalgamation: MapAmalgamation) -> None:
        super().__init__()
        self.standardise = MapStandardise(features)
        self.amalgamation = amalgamation
        self.channels = {name: amalgamation.channels(name) for name in features.layers}
        """Channels of everything that is pooled, in order: amalgamated layers, then those beside the bucket."""
        self.channels |= {name: shape[0] for name, shape in features.beside_layers.items()}

    def vectors(self, maps: Maps) -> tuple[Tensor, dict[str, Tensor]]:
        """One vector an image.

        Args:
            maps: of B images, on any device.

        Returns:
            (B, D) float32, and the assigners' weights as `MapResult` has them: empty for one run.
        """
        layers, beside = self.standardise(maps)
        mixed = self.amalgamation(layers)
        return self.pool({**mixed.layers, **beside}), mixed.weights

    @property
    def settled(self) -> bool:
        """Whether `vectors` has no parameters, so that training cannot change what it gives."""
        return self.amalgamation.runs == 1

    @abc.abstractmethod
    def pool(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Maps (B, C, H, W) by the names of ``channels``, to (B, D)."""

    @abc.abstractmethod
    def scores(self, vectors: Tensor) -> Tensor:
        """Vectors (B, D) to class scores (B, c)."""

    def fit_vectors(self, vectors: Iterable[Tensor]) -> None:
        """Take what the vectors (B, D) of all training images have to be scaled by, where that is needed."""


class LinearNet(ClassificationNet):
    """The mean of every channel over its positions, all side by side, each brought to one scale, into one linear layer.

    The scale is that of the training images before the first step. A channel's mean varies much less from image
    to image than its values from position to position, and every channel by another factor.
    """

    def __init__(
        self, features: FeaturesSpec, amalgamation: MapAmalgamation, *, classes: int, generator: torch.Generator
    ) -> None:
        super().__init__(features, amalgamation)
        self.scale = Standardise(1, sum(self.channels.values()), 0)
        self.linear = nn.Linear(sum(self.channels.values()), classes)
        draw_parameters(self.linear, generator)

    @override
    def pool(self, maps: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([maps[name].mean((2, 3)) for name in self.channels], 1)

    @override
    def scores(self, vectors: Tensor) -> Tensor:
        scaled, _ = self.scale(vectors[:, None], vectors.new_empty(len(vectors), 0))
        scores: Tensor = self.linear(scaled[:, 0])
        return scores

    @override
    @torch.no_grad()
    def fit_vectors(self, vectors: Iterable[Tensor]) -> None:
        deviation, mean = torch.std_mean(torch.cat(list(vectors)).double(), 0, correction=0, keepdim=True)
        empty = torch.empty(0)
        self.scale.fit((mean.float(), deviation.float()), (empty, empty))


class ConvNet(ClassificationNet):
    """A small CNN for every layer at its own size, the mean and the maximum of its channels, and an MLP on all.

    Norms are over all channels of one image's map: batches may be small, and norms of single channels would take
    away the means that are pooled.
    """

    def __init__(
        self,
        features: FeaturesSpec,
        amalgamation: MapAmalgamation,
        *,
        classes: int,
        width: int,
        hidden: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__(features, amalgamation)
        # by place and not by name: a module's name must not hold a dot, a layer's may
        self.branches = nn.ModuleList(_branch(channels, width) for channels in self.channels.values())
        self.mlp = nn.Sequential(
            nn.Linear(2 * width * len(self.channels), hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
        draw_parameters(self.branches, generator)
        draw_parameters(self.mlp, generator)

    @property
    @override
    def settled(self) -> bool:
        return False

    @override
    def pool(self, maps: Mapping[str, Tensor]) -> Tensor:
        seen = [branch(maps[name]) for name, branch in zip(self.channels, self.branches, strict=True)]
        return torch.cat([part for value in seen for part in (value.mean((2, 3)), value.amax((2, 3)))], 1)

    @override
    def scores(self, vectors: Tensor) -> Tensor:
        scores: Tensor = self.mlp(vectors)
        return scores


def _branch(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 1),
        nn.GroupNorm(1, width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(1, width),
        nn.ReLU(),
    )

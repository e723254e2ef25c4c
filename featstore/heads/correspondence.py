"""The correspondence head: where in one image the points of another one are found.

From Meng et al., "Suppress Content Shift", NeurIPS 2024 (arXiv 2410.06719): nearest neighbours by cosine of
amalgamated features (``nn``), or of those after one more convolution (``conv``).

P points, D channels of all layers, h w height and width of the grid that is searched.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from featstore.errors import BadRequestError, IncompatibleError
from featstore.heads.base import Head
from featstore.heads.correspondence_net import CorrespondenceConfig, CorrespondenceNet
from featstore.heads.correspondence_points import Grid, at_points
from featstore.heads.features import Features, FeaturesSpec
from featstore.heads.map_standardise import MapStandardise
from featstore.heads.stream import Maps, read_maps


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Matches:
    """Where points were found."""

    xy: npt.NDArray[np.float32]
    """(P, 2) float32: x and y as shares of the target's width and height, centres of grid positions."""
    cosine: npt.NDArray[np.float32]
    """(P,) float32 in -1..1: how like the point each place is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Embedded:
    """One image as a head compares it."""

    layers: dict[str, Tensor]
    """Layer name to (D, H, W) float32."""
    weights: dict[str, Tensor]
    """The assigners' weights, layer name to (1, n, K, c, H, W); empty for one run."""

    @property
    def nbytes(self) -> int:
        """Bytes of the maps."""
        return sum(value.nbytes for value in self.layers.values())


class CorrespondenceHead(Head):
    """Assigners, convolutions and the statistics that they need."""

    kind = "correspondence"

    def __init__(
        self, features: FeaturesSpec, config: CorrespondenceConfig, net: CorrespondenceNet, standardise: MapStandardise
    ) -> None:
        self._features = features
        self.config = config
        self.net = net.eval()
        self.standardise = standardise

    @property
    @override
    def features(self) -> FeaturesSpec:
        return self._features

    @property
    def map_size(self) -> tuple[int, int]:
        """(H, W) of the largest map, whose positions a point is told apart from in training."""
        shapes = [*self.features.layers.values(), *self.features.beside_layers.values()]
        _, height, width = max(shapes, key=lambda shape: shape[1] * shape[2])
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) positions of the target that are searched."""
        height, width = self.map_size
        return self.config.grid or (2 * height, 2 * width)

    @property
    @override
    def facts(self) -> dict[str, Any]:
        return {"grid": list(self.grid)}

    @property
    @override
    def modules(self) -> dict[str, torch.nn.Module]:
        return {"net": self.net, "standardise": self.standardise}

    @classmethod
    @override
    def build(cls, features: FeaturesSpec, facts: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        height, width = facts["grid"]
        made = CorrespondenceConfig(**{**config, "grid": (height, width) if config.get("grid") else None})
        head = cls.untrained(features, made, seed=0)
        if head.grid != (height, width):
            raise ValueError(f"a head on these layers searches {head.grid} positions, not {(height, width)}")
        return head

    @classmethod
    def untrained(cls, features: FeaturesSpec, config: CorrespondenceConfig, *, seed: int) -> Self:
        """A head with initial parameters, which depend on the seed only."""
        digest = hashlib.sha256(f"featstore correspondence head {seed}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return cls(features, config, CorrespondenceNet(features, config, generator), MapStandardise(features))

    @torch.inference_mode()
    def embed(self, maps: Maps) -> Embedded:
        """The maps of one image as they are compared.

        Raises:
            BadRequestError: for more or less than one image, or maps of other layers.
        """
        if len(maps.rows) != 1:
            raise BadRequestError(f"one image is embedded at a time, not {len(maps.rows)}")
        found = self.net(*self.standardise(maps.to(self.device)))
        return Embedded({name: value[0] for name, value in found.layers.items()}, found.weights)

    @torch.inference_mode()
    def find(self, source: Embedded, target: Grid, xy: npt.NDArray[np.float32]) -> Matches:
        """Find points of one image in another one.

        Args:
            source: the image whose points are given.
            target: the positions that are searched.
            xy: (P, 2) float32: x and y as shares of the source's width and height.
        """
        vectors = at_points(source.layers, torch.from_numpy(xy).to(self.device))
        places, cosines = target.nearest(vectors)
        return Matches(xy=places.cpu().numpy(), cosine=cosines.cpu().numpy())


def match(
    head: CorrespondenceHead,
    features: Features,
    source_row: int,
    target_row: int,
    points_xy: npt.NDArray[np.floating[Any]],
) -> Matches:
    """Find points of one image in another one.

    Args:
        head: trained on features of the same specification.
        features: the maps.
        source_row: row of the image whose points are given.
        target_row: row of the image in which they are looked for.
        points_xy: (P, 2): x and y as shares of the source's width and height, 0..1.

    Raises:
        BadRequestError: for points outside 0..1, or rows outside the arrays.
        IncompatibleError: if the features are not of the layers that the head was trained on.
    """
    check_layers(head, features)
    xy = np.ascontiguousarray(points_xy, np.float32)
    if xy.ndim != 2 or xy.shape[1] != 2 or not ((xy >= 0) & (xy <= 1)).all():
        raise BadRequestError(f"points are (P, 2), x and y in 0..1 of width and height; given {xy.shape}: {xy[:3]}")
    for row in (source_row, target_row):
        if not 0 <= row < features.images:
            raise BadRequestError(f"row {row} is outside 0..{features.images - 1}")
    if not len(xy):
        return Matches(xy=xy, cosine=np.empty(0, np.float32))
    maps = read_maps(features, [source_row, target_row])
    source, target = (head.embed(maps.take([place])) for place in range(2))
    return head.find(source, Grid(target.layers, head.grid), xy)


def check_layers(head: CorrespondenceHead, features: Features) -> None:
    """Refuse features that the head was not made for.

    Raises:
        IncompatibleError: if layers, their shapes or the number of runs differ.
    """
    mine, theirs = head.features, features.spec()
    for what, a, b in (
        ("layers", mine.layers, theirs.layers),
        ("layers beside them", mine.beside_layers, theirs.beside_layers),
        ("number of runs", len(mine.runs), len(theirs.runs)),
    ):
        if a != b:
            raise IncompatibleError(
                f"the {what} that the head was trained on differ from those given: {a} and {b}",
                hint="give the features that the head names, or train a head on these",
            )

"""Amalgamation of whole maps: small CNNs that weigh the runs of a bucket, layer by layer at its own size.

From Meng et al., "Suppress Content Shift", NeurIPS 2024 (arXiv 2410.06719): n assigners give each of
the K maps a weight at every position, a softmax over the K; the n weighted sums are concatenated. The
paper's weight is one number a run; the authors' code has one a channel of the run (``per_channel``).

B images, K runs in the bucket, C channels of a layer, H W its height and width, n assigners, c channels
of a weight: 1, or C where it is per channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featstore.errors import BadRequestError
from featstore.heads import amalgamation
from featstore.heads.features import Shapes
from featstore.heads.initial import draw_parameters


@dataclasses.dataclass(frozen=True, slots=True)
class MapResult:
    """Maps of B images after amalgamation."""

    layers: dict[str, Tensor]
    """Layer name to (B, n*C, H, W) float32, assigner by assigner; (B, C, H, W) for one run."""
    weights: dict[str, Tensor]
    """Layer name to (B, n, K, c, H, W) float32 in 0..1, sums to 1 over K; empty for one run."""


class MapAmalgamation(nn.Module):
    """n assigners for every layer; a single run passes through, and has none."""

    def __init__(
        self,
        shapes: Shapes,
        *,
        runs: int,
        assigners: int,
        per_channel: bool = False,
        hidden: int = 16,
        generator: torch.Generator,
    ) -> None:
        """Draw the initial parameters.

        Args:
            shapes: layer name to (C, H, W).
            runs: K.
            assigners: n, 1 or more.
            per_channel: whether an assigner weighs each channel apart, and not each run as a whole.
            hidden: hidden channels of an assigner.
            generator: of the initial parameters, on the CPU.

        Raises:
            BadRequestError: for sizes that no assigner can have.
        """
        if min(runs, assigners, hidden) < 1:
            raise BadRequestError(
                f"amalgamation needs 1 run or more, 1 assigner or more and 1 hidden channel or more, "
                f"not {runs}, {assigners} and {hidden}"
            )
        super().__init__()
        self.shapes = dict(shapes)
        self.runs = runs
        self.assigners = assigners
        # by place and not by name: a module's name must not hold a dot, a layer's may
        self.layers = nn.ModuleList(
            _Assigners(runs, shape[0], assigners, hidden, per_channel) for shape in shapes.values() if runs > 1
        )
        draw_parameters(self, generator)

    def channels(self, layer: str) -> int:
        """Channels of a layer after amalgamation: n*C, or C for one run."""
        return self.shapes[layer][0] * (self.assigners if self.runs > 1 else 1)

    def forward(self, layers: Mapping[str, Tensor]) -> MapResult:
        """Amalgamate.

        Args:
            layers: layer name to (B, K, C, H, W) float32, standardised.

        Raises:
            BadRequestError: for a missing layer, or one of another shape.
        """
        maps = {name: self._checked(layers, name) for name in self.shapes}
        if self.runs == 1:
            return MapResult({name: value[:, 0] for name, value in maps.items()}, {})
        weights = {name: part(maps[name]) for name, part in zip(self.shapes, self.layers, strict=True)}
        return MapResult({name: amalgamate(maps[name], weights[name]) for name in maps}, weights)

    def _checked(self, layers: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in layers:
            raise BadRequestError(f"the head needs layer {name!r}; given: {', '.join(sorted(layers)) or 'none'}")
        value, wanted = layers[name], (self.runs, *self.shapes[name])
        if tuple(value.shape[1:]) != wanted:
            raise BadRequestError(f"layer {name!r} is {tuple(value.shape[1:])} an image, the head needs {wanted}")
        return value


class _Assigners(nn.Module):
    """The n assigners of one layer, each 3x3 convolution K*C -> hidden, ReLU, norm, 1x1 convolution -> K*c.

    An assigner sees all runs at once, so that it can weigh them against each other. Its norm is over the
    hidden map of one image: batches of whole maps are too small for the statistics of a batch.
    """

    def __init__(self, runs: int, channels: int, assigners: int, hidden: int, per_channel: bool) -> None:
        super().__init__()
        self.runs = runs
        self.assigners = assigners
        scores = runs * (channels if per_channel else 1)
        # the first convolutions of all assigners are one; a group of the others is one assigner
        self.hidden = nn.Conv2d(runs * channels, assigners * hidden, 3, padding=1)
        self.norm = nn.GroupNorm(assigners, assigners * hidden)
        self.scores = nn.Conv2d(assigners * hidden, assigners * scores, 1, groups=assigners)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, K, C, H, W) to weights (B, n, K, c, H, W)."""
        scores: Tensor = self.scores(self.norm(torch.relu(self.hidden(maps.flatten(1, 2)))))
        batch, _, height, width = scores.shape
        return scores.view(batch, self.assigners, self.runs, -1, height, width).softmax(2)


def amalgamate(maps: Tensor, weights: Tensor) -> Tensor:
    """The n weighted sums of the K maps of a layer, side by side.

    Args:
        maps: (B, K, C, H, W) float32.
        weights: (B, n, K, c, H, W) float32.

    Returns:
        (B, n*C, H, W) float32.
    """
    mixed = weights[:, :, 0] * maps[:, None, 0]
    for run in range(1, maps.shape[1]):  # run by run: all products at once would be K times the result
        mixed = torch.addcmul(mixed, weights[:, :, run], maps[:, None, run])
    return mixed.flatten(1, 2)


def regulariser(weights: Mapping[str, Tensor], gamma1: float, gamma2: float) -> Tensor:
    """The extra loss of the paper (see `featstore.heads.amalgamation.regulariser`), to be minimised.

    It is the mean over positions, and over channels where they have weights of their own; the mean over
    layers, so that its factors mean the same for any number of them.

    Args:
        weights: layer name to (B, n, K, c, H, W) float32, as `MapAmalgamation` gives them.
        gamma1: factor of the sparsity term.
        gamma2: factor of the diversity term.

    Returns:
        () float32; 0 for one run.
    """
    if not weights:
        return torch.zeros(())
    return torch.stack([amalgamation.regulariser(w, gamma1, gamma2).mean() for w in weights.values()]).mean()


class MapWeights:
    """What the assigners chose, summed up over any number of batches."""

    def __init__(self) -> None:
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._images = 0

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Count a batch's weights, each (B, n, K, c, H, W); none for one run."""
        for name, value in weights.items():
            batch = value.detach().mean((3, 4, 5), dtype=torch.float64).sum(0).cpu().numpy()
            self._sums[name] = self._sums.get(name, 0.0) + batch
        self._images += next((len(value) for value in weights.values()), 0)

    def by_layer(self) -> dict[str, npt.NDArray[np.float32]]:
        """Layer name to (n, K) float32: mean weight over images, positions and channels; empty for one run."""
        return {name: (value / self._images).astype(np.float32) for name, value in self._sums.items()}

    def to_json(self) -> dict[str, list[list[float]]]:
        """`by_layer` as plain JSON: for each layer, for each assigner, the mean weight of each run."""
        return {name: value.tolist() for name, value in self.by_layer().items()}

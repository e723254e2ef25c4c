"""Amalgamation: small networks that weigh the runs of a bucket, pixel by pixel.

From Meng et al., "Suppress Content Shift", NeurIPS 2024 (arXiv 2410.06719): n assigners give each of
the K features of a pixel a scalar weight, a softmax over the K; the n weighted sums are concatenated.
The authors' code gives each channel of each feature a weight of its own (``per_channel``).

M members, P pixels, K runs in the bucket, C channels of a run, n assigners.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from featstore.errors import BadRequestError
from featstore.heads.members import MemberLinear, MemberModule, MemberNorm, MemberRowLinear, uniform


class PixelAssigners(MemberModule):
    """n assigners for each of M members.

    An assigner is an MLP on the K vectors of a pixel side by side, K*C -> hidden (ReLU, BatchNorm)
    -> K, or K*C for weights per channel. It sees all runs at once, so that it can tell them apart and
    weigh them against each other.
    """

    def __init__(
        self,
        *,
        runs: int,
        channels: int,
        assigners: int,
        hidden: int,
        per_channel: bool = False,
        generators: Sequence[torch.Generator],
    ) -> None:
        if runs < 2 or assigners < 1 or hidden < 1:
            raise BadRequestError(
                f"amalgamation needs 2 runs or more, 1 assigner or more and 1 hidden channel or more, "
                f"not {runs}, {assigners} and {hidden}"
            )
        super().__init__()
        self.assigners = assigners
        self.runs = runs
        # the first layers of all assigners are one matrix product; the second ones are n small ones
        self.hidden = MemberRowLinear((runs * channels,), assigners * hidden, generators)
        self.norm = MemberNorm(assigners * hidden, len(generators))
        # an assigner of a member is a member of this layer: (M*n, hidden, P)
        self.scores = (
            _ChannelScores(assigners, hidden, runs, channels, generators)
            if per_channel
            else _AssignerScores(assigners, hidden, runs, generators)
        )

    def forward(self, runs: Tensor) -> Tensor:
        """Weights of the runs at every pixel.

        Args:
            runs: (M, P, K, C) float32, standardised.

        Returns:
            (M, n, K, P) float32 in 0..1, sums to 1 over K; (M, n, K, C, P) where they are per channel.
        """
        members, pixels = runs.shape[:2]
        hidden = torch.relu(self.hidden(runs.reshape(members, pixels, -1)))
        return torch.softmax(self.scores(self.norm(hidden)), dim=2)


class _AssignerScores(MemberModule):
    """The second layer of every assigner: (M, n*hidden, P) to (M, n, K, P)."""

    def __init__(self, assigners: int, hidden: int, runs: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        linear = MemberLinear(hidden, assigners * runs, generators)
        self.weight = torch.nn.Parameter(linear.weight.detach().reshape(-1, assigners, runs, hidden))
        self.bias = torch.nn.Parameter(linear.bias.detach().reshape(-1, assigners, runs, 1))

    def forward(self, x: Tensor) -> Tensor:
        members, assigners, runs, hidden = self.weight.shape
        scores = torch.baddbmm(self.bias.flatten(0, 1), self.weight.flatten(0, 1), x.reshape(-1, hidden, x.shape[2]))
        return scores.view(members, assigners, runs, -1)


class _ChannelScores(MemberModule):
    """The second layer of assigners per channel: (M, n*hidden, P) to (M, n, K, C, P)."""

    def __init__(
        self, assigners: int, hidden: int, runs: int, channels: int, generators: Sequence[torch.Generator]
    ) -> None:
        super().__init__()
        bound = 1 / math.sqrt(hidden)
        self.runs = runs
        self.weight = torch.nn.Parameter(uniform((assigners, hidden, runs * channels), bound, generators))
        self.bias = torch.nn.Parameter(uniform((assigners, 1, runs * channels), bound, generators))

    def forward(self, x: Tensor) -> Tensor:
        members, assigners, hidden, width = self.weight.shape
        rows = x.reshape(-1, hidden, x.shape[2]).transpose(1, 2)  # (M*n, P, hidden)
        scores = torch.baddbmm(self.bias.flatten(0, 1), rows, self.weight.flatten(0, 1))
        # channels last in memory, as in the vectors that they weigh
        return scores.view(members, assigners, -1, self.runs, width // self.runs).permute(0, 1, 3, 4, 2)


def amalgamate(runs: Tensor, weights: Tensor) -> Tensor:
    """The n weighted sums of a pixel's K vectors, side by side.

    Args:
        runs: (M, P, K, C) float32.
        weights: (M, n, K, P) or (M, n, K, C, P) float32, as `PixelAssigners` gives them.

    Returns:
        (M, P, n*C) float32.
    """
    members, pixels, count, channels = runs.shape
    if weights.ndim == 5:
        own, values = weights.permute(2, 0, 4, 1, 3), runs.permute(2, 0, 1, 3).unsqueeze(3)  # (K, M, P, n or 1, C)
        mixed = own[0] * values[0]
        for run in range(1, count):  # run by run: all products at once would be K times the result
            mixed = torch.addcmul(mixed, own[run], values[run])
        return mixed.reshape(members, pixels, -1)
    # contiguous even for one member, where reshape would give a view: bmm copies such matrices one by one
    mix = weights.permute(0, 3, 1, 2).contiguous().view(members * pixels, -1, count)
    return torch.bmm(mix, runs.reshape(members * pixels, count, channels)).view(members, pixels, -1)


def regulariser(weights: Tensor, gamma1: float, gamma2: float) -> Tensor:
    """The extra loss of the paper, the mean over pixels, and over channels where they have their own weights.

    ``-gamma1 * sum_j ||w^j||_2 - (gamma2 / 2) * sum_j sum_{k != j} ||w^j - w^k||_2`` with w^j the K
    weights that assigner j gives a pixel: the first term rewards weights that choose one run
    (sparsity), the second assigners that choose differently (diversity).

    Args:
        weights: (M, n, K, P) or (M, n, K, C, P) float32; any further axes are averaged over.
        gamma1: factor of the sparsity term.
        gamma2: factor of the diversity term.

    Returns:
        (M,) float32.
    """
    loss = -gamma1 * _norm(weights).sum(1)
    if gamma2 and weights.shape[1] > 1:
        j, k = torch.triu_indices(weights.shape[1], weights.shape[1], offset=1, device=weights.device)
        # every unordered pair appears twice in the double sum, hence no half here
        loss = loss - gamma2 * _norm(weights[:, j] - weights[:, k]).sum(1)
    return loss.flatten(1).mean(1)


def run_weights(weights: Tensor) -> Tensor:
    """What each run weighs as a whole: (M, n, K, P) as they are, (M, n, K, C, P) as means over the channels."""
    return weights if weights.ndim == 4 else weights.mean(3)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm over the K runs; the tiny term keeps the gradient finite where assigners agree."""
    return (x.square().sum(2) + 1e-12).sqrt()

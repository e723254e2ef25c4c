"""The pixel head: an MLP on amalgamated pixel vectors, M ensemble members in one module.

M members, P pixels, K runs in the bucket, C channels of a run, A attention channels, n assigners.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from featstore.errors import BadRequestError
from featstore.heads.amalgamation import PixelAssigners, amalgamate
from featstore.heads.members import MemberLinear, MemberModule, MemberNorm, MemberRowLinear

_MANY_CLASSES = 30


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PixelHeadConfig:
    """How a pixel head is built and trained; the defaults are the paper's where it gives them."""

    members: int = 10
    """Size of the ensemble, M."""
    assigners: int = 2
    """Assigners n that amalgamate a bucket of two runs or more; a single run has none.

    The paper measures 64.6 mIoU with one, 65.4 with two, three and four: two are the cheapest that do.
    """
    assigner_hidden: int = 16
    """Hidden channels of an assigner."""
    per_channel: bool = False
    """Whether an assigner weighs each channel apart, as the authors' code does, and not each run as a whole."""
    gamma1: float = 1e-3
    """Factor of the regulariser's sparsity term; the paper tunes it per data set."""
    gamma2: float = 1e-3
    """Factor of the regulariser's diversity term; the paper tunes it per data set."""
    hidden: tuple[int, int] | None = None
    """Hidden channels of the MLP; None: (128, 32), or (256, 128) from 30 classes on."""
    learning_rate: float = 1e-3
    """Step size of Adam."""
    batch_size: int = 64
    """Pixels of a step, per member."""
    max_epochs: int = 100
    """Epochs at most; an epoch is one pass over the labelled training pixels, without the last partial batch."""
    free_epochs: int = 4
    """Epochs before early stopping begins to count: "after epoch 3", counted from 0."""
    patience_steps: int = 50
    """A member stops when its batch loss has set no new minimum for this many steps."""
    max_steps: int | None = None
    """Steps at most, for quick runs; None: no limit but ``max_epochs``."""

    def __post_init__(self) -> None:
        """Refuse values that no training can have."""
        for field, least in (
            ("members", 1),
            ("assigners", 1),
            ("assigner_hidden", 1),
            ("batch_size", 2),
            ("max_epochs", 1),
            ("free_epochs", 0),
            ("patience_steps", 1),
        ):
            if getattr(self, field) < least:
                raise BadRequestError(f"{field} {getattr(self, field)} must be {least} or more")
        if self.max_steps is not None and self.max_steps < 1:
            raise BadRequestError(f"max_steps {self.max_steps} must be 1 or more")
        if not self.learning_rate > 0:
            raise BadRequestError(f"learning_rate {self.learning_rate} must be positive")
        for field in ("gamma1", "gamma2"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) >= 0):
                raise BadRequestError(f"{field} {getattr(self, field)} must be 0 or more")
        if self.hidden is not None and (len(self.hidden) != 2 or min(self.hidden) < 1):
            raise BadRequestError(f"hidden {self.hidden} must be two positive numbers")

    def hidden_for(self, classes: int) -> tuple[int, int]:
        """Hidden channels of the MLP for this many classes."""
        if self.hidden is not None:
            return self.hidden
        return (256, 128) if classes >= _MANY_CLASSES else (128, 32)


def member_generator(seed: int, member: int) -> torch.Generator:
    """The source of a member's initial parameters and batches: depends on these two numbers only."""
    digest = hashlib.sha256(f"featstore pixel head {seed} {member}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class PixelMembers(MemberModule):
    """Assigners (for two runs or more) and MLP of M members; inputs are standardised."""

    def __init__(
        self,
        config: PixelHeadConfig,
        *,
        runs: int,
        channels: int,
        attention: int,
        classes: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        super().__init__()
        count = len(generators)
        first, second = config.hidden_for(classes)
        self.assigners = (
            PixelAssigners(
                runs=runs,
                channels=channels,
                assigners=config.assigners,
                hidden=config.assigner_hidden,
                per_channel=config.per_channel,
                generators=generators,
            )
            if runs > 1
            else None
        )
        mixed = channels * (config.assigners if runs > 1 else 1)
        # one linear layer on [amalgamated, attention]
        self.linear1 = MemberRowLinear((mixed, attention) if attention else (mixed,), first, generators)
        self.norm1 = MemberNorm(first, count)
        self.linear2 = MemberLinear(first, second, generators)
        self.norm2 = MemberNorm(second, count)
        self.linear3 = MemberLinear(second, classes, generators)

    def forward(self, runs: Tensor, attention: Tensor) -> tuple[Tensor, Tensor | None]:
        """Class scores of pixels.

        Args:
            runs: (M, P, K, C) float32, standardised.
            attention: (M, P, A) float32, standardised.

        Returns:
            logits (M, classes, P) float32, and the assigners' weights (M, n, K, P), (M, n, K, C, P) where
            they are per channel, None for one run.
        """
        weights = None
        mixed = runs.flatten(2)
        if self.assigners is not None:
            weights = self.assigners(runs)
            mixed = amalgamate(runs, weights)
        x = self.norm1(torch.relu(self.linear1(mixed, attention)))
        x = self.norm2(torch.relu(self.linear2(x)))
        return self.linear3(x), weights


def majority_vote(probabilities: Tensor) -> Tensor:
    """The class that most members choose; a tie goes to the class of the higher mean probability.

    Args:
        probabilities: (M, classes, P) float32.

    Returns:
        (P,) int64.
    """
    votes = torch.zeros_like(probabilities).scatter_(1, probabilities.argmax(1, keepdim=True), 1.0).sum(0)
    # a mean probability is at most 1, so half of it decides ties and nothing else
    chosen: Tensor = (votes + 0.5 * probabilities.mean(0)).argmax(0)
    return chosen


def jensen_shannon(probabilities: Tensor) -> Tensor:
    """How much the members disagree: entropy of their mean minus the mean of their entropies.

    Args:
        probabilities: (M, classes, P) float32, sums to 1 over classes.

    Returns:
        (P,) float32 in nats, from 0 (all members say the same) to ln(min(M, classes)).
    """
    mean = probabilities.mean(0)
    divergence: Tensor = torch.special.entr(mean).sum(0) - torch.special.entr(probabilities).sum(1).mean(0)
    return divergence.clamp_min(0)  # rounding may leave -1e-8

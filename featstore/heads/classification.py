"""A head that says what a whole image shows, from maps that are pooled.

B images, K runs in the bucket, C channels of a layer, H W its height and width, n assigners, c classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from featstore.errors import BadRequestError, unknown_name
from featstore.heads.base import Head
from featstore.heads.classification_net import ClassificationNet, ConvNet, LinearNet
from featstore.heads.features import FeaturesSpec
from featstore.heads.map_amalgamation import MapAmalgamation, MapWeights
from featstore.heads.stream import Maps, given_maps

FORMS = ("conv", "linear")
"""What follows the amalgamation: a small CNN a layer and an MLP, or one linear layer."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationConfig:
    """How a classification head is built and trained.

    The paper says no more of its classifier than its accuracy; these are choices of this package.
    """

    form: str = "conv"
    """One of `FORMS`."""
    assigners: int = 2
    """Assigners n that amalgamate a bucket of two runs or more; a single run has none."""
    per_channel: bool = False
    """Whether an assigner weighs each channel apart, and not each run as a whole."""
    assigner_hidden: int = 16
    """Hidden channels of an assigner."""
    gamma1: float = 1e-3
    """Factor of the regulariser's sparsity term."""
    gamma2: float = 1e-3
    """Factor of the regulariser's diversity term."""
    width: int = 64
    """Channels of each layer's CNN (``conv``)."""
    hidden: int = 128
    """Hidden channels of the MLP (``conv``)."""
    learning_rate: float = 1e-3
    """First step size of AdamW; it falls to 0 along half a cosine."""
    weight_decay: float = 0.01
    """AdamW's decay of weights."""
    label_smoothing: float = 0.0
    """Part of a label's weight that is spread over all classes, 0..1."""
    batch_size: int = 32
    """Images of a step."""
    epochs: int = 20
    """Passes over the training images, unless ``least_steps`` takes more."""
    least_steps: int = 200
    """Steps that few images are gone through again and again for."""
    max_steps: int | None = None
    """Steps at most, for quick runs; None: no limit but the two above."""

    def __post_init__(self) -> None:
        """Refuse values that no training can have."""
        if self.form not in FORMS:
            raise unknown_name("form of a classification head", self.form, FORMS)
        for field in ("assigners", "assigner_hidden", "width", "hidden", "batch_size", "epochs", "least_steps"):
            if getattr(self, field) < 1:
                raise BadRequestError(f"{field} {getattr(self, field)} must be 1 or more")
        if self.max_steps is not None and self.max_steps < 1:
            raise BadRequestError(f"max_steps {self.max_steps} must be 1 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise BadRequestError(f"learning_rate {self.learning_rate} must be positive")
        for field in ("gamma1", "gamma2", "weight_decay"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) >= 0):
                raise BadRequestError(f"{field} {getattr(self, field)} must be 0 or more")
        if not 0 <= self.label_smoothing < 1:
            raise BadRequestError(f"label_smoothing {self.label_smoothing} must be 0 or more and below 1")

    def steps(self, images: int) -> int:
        """Steps of a training on this many images."""
        steps = max(self.epochs * math.ceil(images / self.batch_size), self.least_steps)
        return steps if self.max_steps is None else min(steps, self.max_steps)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassPrediction:
    """What a head says about B images."""

    labels: npt.NDArray[np.int64]
    """(B,) int64: the most probable class."""
    probabilities: npt.NDArray[np.float32]
    """(B, c) float32 in 0..1, sums to 1 over classes."""
    assigner_weights: dict[str, npt.NDArray[np.float32]]
    """Layer name to (n, K) float32: mean over images, positions and channels; empty for one run."""


class ClassificationHead(Head):
    """A network on the maps of a bucket, with the names of its classes."""

    kind = "classification"

    def __init__(
        self, features: FeaturesSpec, classes: Sequence[str], config: ClassificationConfig, generator: torch.Generator
    ) -> None:
        """A head with initial parameters.

        Args:
            features: the maps that it reads.
            classes: names in label order, two or more.
            config: of the head and its training.
            generator: of the initial parameters, on the CPU.

        Raises:
            BadRequestError: for fewer than two classes.
        """
        if len(classes) < 2:
            raise BadRequestError(f"a classification head needs 2 classes or more, not {len(classes)}")
        self.config = config
        self.classes = tuple(classes)
        self._features = features
        with torch.random.fork_rng(devices=[]):  # modules draw numbers that are then drawn again
            self.net = _net(features, len(self.classes), config, generator).eval()

    @property
    @override
    def features(self) -> FeaturesSpec:
        return self._features

    @property
    @override
    def facts(self) -> dict[str, Any]:
        return {"classes": list(self.classes)}

    @property
    @override
    def modules(self) -> dict[str, torch.nn.Module]:
        return {"net": self.net}

    @classmethod
    @override
    def build(cls, features: FeaturesSpec, facts: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        return cls(features, tuple(facts["classes"]), ClassificationConfig(**config), head_generator(0))

    def predict(
        self,
        maps: Sequence[Mapping[str, npt.NDArray[Any] | Tensor]],
        beside: Mapping[str, npt.NDArray[Any] | Tensor] | None = None,
    ) -> ClassPrediction:
        """Classify images from their features.

        Args:
            maps: for each of the K runs in ``features.runs`` order, layer name to (B, C, H, W) float16 or
                float32; further layers are ignored.
            beside: (B, C, H, W) by the names of ``features.beside_layers``.

        Raises:
            BadRequestError: if runs or layers are missing or have other shapes.
        """
        return self.predict_maps(given_maps(self.features, maps, beside))

    @torch.inference_mode()
    def predict_maps(self, maps: Maps) -> ClassPrediction:
        """Classify the B images of a batch, as a `Stream` gives it."""
        vectors, weights = self.net.vectors(maps)
        probabilities = self.net.scores(vectors).softmax(1)
        chosen = MapWeights()
        chosen.update(weights)
        return ClassPrediction(
            labels=probabilities.argmax(1).cpu().numpy(),
            probabilities=probabilities.cpu().numpy(),
            assigner_weights=chosen.by_layer(),
        )


def _net(
    features: FeaturesSpec, classes: int, config: ClassificationConfig, generator: torch.Generator
) -> ClassificationNet:
    amalgamation = MapAmalgamation(
        features.layers,
        runs=len(features.runs),
        assigners=config.assigners,
        per_channel=config.per_channel,
        hidden=config.assigner_hidden,
        generator=generator,
    )
    if config.form == "linear":
        return LinearNet(features, amalgamation, classes=classes, generator=generator)
    return ConvNet(
        features, amalgamation, classes=classes, width=config.width, hidden=config.hidden, generator=generator
    )


def head_generator(seed: int) -> torch.Generator:
    """The source of a head's initial parameters, which depend on the seed only."""
    digest = hashlib.sha256(f"featstore classification head {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

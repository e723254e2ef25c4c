"""A trained pixel head: what it needs, and its predictions.

B images, K runs in the bucket, C A channels of runs and of what stands beside them, H W map height and width, h w
height and width of the label grid, M members, n assigners, P pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from featstore.heads.amalgamation import run_weights
from featstore.heads.base import Head
from featstore.heads.features import FeaturesSpec
from featstore.heads.pixels import PixelHeadConfig, PixelMembers, jensen_shannon, majority_vote, member_generator
from featstore.heads.standardise import Standardise
from featstore.heads.stream import given_maps
from featstore.heads.tables import PixelTables

_CHUNK_BYTES = 8 * 1024**2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PixelSpec:
    """What a head that labels pixels was trained on, and therefore needs."""

    features: FeaturesSpec
    """The maps that it reads."""
    classes: tuple[str, ...]
    """Names of the classes in label order."""
    size: tuple[int, int]
    """(h, w) of the label grid in pixels."""
    ignore_label: int = 255
    """Label of pixels that do not count."""
    absent: tuple[str, ...] = ()
    """Names of classes without a training pixel, which the head cannot have learned: they have no score."""

    @property
    def facts(self) -> dict[str, Any]:
        """All but the features as plain JSON; `of` is its inverse."""
        return {
            "classes": list(self.classes),
            "size": list(self.size),
            "ignore_label": self.ignore_label,
            "absent": list(self.absent),
        }

    @classmethod
    def of(cls, features: FeaturesSpec, facts: Mapping[str, Any]) -> Self:
        """The specification with these facts; KeyError or ValueError if they are none."""
        height, width = facts["size"]
        return cls(
            features=features,
            classes=tuple(facts["classes"]),
            size=(height, width),
            ignore_label=facts["ignore_label"],
            absent=tuple(facts.get("absent", ())),  # heads of the first versions do not say
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a head says about B images."""

    labels: npt.NDArray[np.uint8]
    """(B, h, w) uint8: majority vote of the members."""
    member_labels: npt.NDArray[np.uint8]
    """(M, B, h, w) uint8: each member's own choice."""
    uncertainty: npt.NDArray[np.float32]
    """(B, h, w) float32: Jensen-Shannon divergence of the members in nats, 0..ln(min(M, classes))."""
    weights: npt.NDArray[np.float32] | None
    """(B, K, h, w) float32, sums to 1 over K: runs' weights, mean over members and assigners; None for one run."""
    assigner_weights: npt.NDArray[np.float32] | None
    """(M, n, K) float32, sums to 1 over K: mean over all pixels of the B images; None for one run."""


class PixelHead(Head):
    """An ensemble of pixel classifiers with the statistics and the specification that they need."""

    kind = "pixel"

    def __init__(
        self, spec: PixelSpec, config: PixelHeadConfig, members: PixelMembers, standardise: Standardise
    ) -> None:
        self.spec = spec
        self.config = config
        self.members = members.eval()
        self.standardise = standardise

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
        return {"members": self.members, "standardise": self.standardise}

    @classmethod
    @override
    def build(cls, features: FeaturesSpec, facts: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        spec = PixelSpec.of(features, facts)
        values = dict(config)
        if values.get("hidden") is not None:
            values["hidden"] = tuple(values["hidden"])
        made = PixelHeadConfig(**values)
        return cls.untrained(spec, made, [member_generator(0, member) for member in range(made.members)])

    @classmethod
    def untrained(cls, spec: PixelSpec, config: PixelHeadConfig, generators: Sequence[torch.Generator]) -> Self:
        """A head with initial parameters, each member's drawn from its own generator."""
        runs, channels, beside = len(spec.features.runs), spec.features.channels, spec.features.beside_channels
        members = PixelMembers(
            config,
            runs=runs,
            channels=channels,
            attention=beside,
            classes=len(spec.classes),
            generators=generators,
        )
        return cls(spec, config, members, Standardise(runs, channels, beside))

    def tables(self, images: int, dtype: torch.dtype) -> PixelTables:
        """Empty tables for the maps of this many images on the head's device."""
        return PixelTables(
            images=images,
            runs=len(self.features.runs),
            layers=self.features.layers,
            attention=self.features.beside_layers,
            grid_size=self.spec.size,
            dtype=dtype,
            device=self.device,
        )

    def predict(
        self,
        maps: Sequence[Mapping[str, npt.NDArray[Any] | Tensor]],
        beside: Mapping[str, npt.NDArray[Any] | Tensor] | None = None,
    ) -> Prediction:
        """Label images from their features.

        Args:
            maps: for each of the K runs in ``features.runs`` order, layer name to (B, C, H, W) float16 or
                float32; further layers are ignored.
            beside: (B, C, H, W) by the names of ``features.beside_layers``.

        Raises:
            BadRequestError: if runs or layers are missing or have other shapes.
        """
        given = given_maps(self.features, maps, beside)
        images = range(len(given.rows))
        tables = self.tables(len(images), torch.float32)
        for name, table in tables.layers.items():
            for run in range(len(self.features.runs)):
                table.put(run, images, given.layers[name][:, run])
        for name, table in tables.attention.items():
            table.put(0, images, given.beside[name])
        return self.predict_tables(tables)

    @torch.inference_mode()
    def predict_tables(self, tables: PixelTables) -> Prediction:
        """Label all images of filled tables, which are standardised here."""
        tables.standardise(self.standardise)
        # a member at a time on many pixels: they share their inputs, and matrices are large enough alone
        members = [self.members.take([m]).eval() for m in range(self.members.members)]
        shape = (tables.images, *tables.grid_size)
        total = tables.images * tables.pixels_an_image
        runs = len(self.features.runs)
        labels = np.empty(total, np.uint8)
        member_labels = np.empty((len(members), total), np.uint8)
        uncertainty = np.empty(total, np.float32)
        weights = np.empty((total, runs), np.float32) if runs > 1 else None
        means: list[Tensor] = []
        chunk = max(256, _CHUNK_BYTES // (4 * tables.width))
        memory = tables.empty(min(chunk, total))
        for start in range(0, total, chunk):
            here = slice(start, min(start + chunk, total))
            pixels = torch.arange(here.start, here.stop, device=tables.device)
            vectors, attention = tables.gather(pixels, (memory[0][: len(pixels)], memory[1][: len(pixels)]))
            outputs = [_say(member, vectors.unsqueeze(0), attention.unsqueeze(0)) for member in members]
            probabilities = torch.cat([logits for logits, _ in outputs]).softmax(1)
            labels[here] = majority_vote(probabilities).cpu().numpy()
            member_labels[:, here] = probabilities.argmax(1).cpu().numpy()
            uncertainty[here] = jensen_shannon(probabilities).cpu().numpy()
            chosen = [w for _, w in outputs if w is not None]
            if weights is not None:
                chosen_by_all = torch.cat(chosen)  # (M, n, K, P)
                weights[here] = chosen_by_all.mean((0, 1)).T.cpu().numpy()
                means.append(chosen_by_all.sum(3, dtype=torch.float64).cpu())
        return Prediction(
            labels=labels.reshape(shape),
            member_labels=member_labels.reshape(-1, *shape),
            uncertainty=uncertainty.reshape(shape),
            weights=None if weights is None else weights.reshape(*shape, runs).transpose(0, 3, 1, 2),
            assigner_weights=(torch.stack(means).sum(0) / total).float().numpy() if means else None,
        )


def _say(member: PixelMembers, runs: Tensor, beside: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits (1, classes, P), and what each run weighs (1, n, K, P); weights per channel are not kept."""
    logits, weights = member(runs, beside)
    return logits, None if weights is None else run_weights(weights)

"""The quantitative part: how far features under each technique have drifted from those of the image itself.

The reference of every technique is the feature of ``basic`` at t = 0, as an image's own content does not depend on how
a pass is steered. Nothing is stored: maps are reduced to where they change as soon as a pass has made them.

n images, B images of a batch, C channels, H W map height and width.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from featstore import content_shift
from featstore.pipelines.batch import cpu_batch_size
from featstore.pipelines.gate.planning import GatePlan
from featstore.pipelines.gate.sample import Images, require
from featstore.pipelines.progress import Progress

if TYPE_CHECKING:
    import torch

    from featstore.extraction.forward import Extractor
    from featstore.models.backbones.base import Backbone

Float64Array = npt.NDArray[np.float64]
Key = tuple[str, int]
"""Technique and timestep."""
_MAX_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the features say."""

    layers: Mapping[Key, Mapping[str, Float64Array]]
    """The paper's score of each layer, (n,)."""
    patterns: Mapping[Key, Mapping[str, Float64Array]]
    """The score of patterns of each layer, (n,)."""
    seconds_per_pass: Mapping[str, float]
    """Of one image under each technique: of its fastest batch, without the loading."""
    good: npt.NDArray[np.bool_]
    """Which of the images were judged by, (images,); n of them."""
    failed: Mapping[str, str]
    """Why others were not, by key."""

    def of(self, key: Key) -> Float64Array:
        """Mean of the layers' scores, (n,): every layer counts the same, whatever its size."""
        return _mean(self.layers[key])

    def pattern_of(self, key: Key) -> Float64Array:
        """The same of patterns."""
        return _mean(self.patterns[key])


def _mean(layers: Mapping[str, Float64Array]) -> Float64Array:
    mean: Float64Array = np.mean(list(layers.values()), axis=0)
    return mean


def batch_size_of(plan: GatePlan, images: int) -> int:
    """Images of a batch: small, so that memory never is what a gate fails of, and there are several to time."""
    most = cpu_batch_size(plan.extract.source, *plan.size_px)
    return max(1, min(most, _MAX_BATCH_SIZE, images))


def score(plan: GatePlan, images: Images, model: Backbone, progress: Progress) -> Scores:
    """Run the passes and score every layer of every image against the anchor.

    Raises:
        BadRequestError: if the anchor has no content shift, or too few images have finite features.
    """
    from featstore.extraction.forward import Extractor
    from featstore.models.quiet import quiet

    runs = plan.runs
    names = list(runs)
    keys = list(
        dict.fromkeys([*((name, t) for name in plan.techniques for t in (*plan.config.timesteps, 0)), plan.anchor])
    )
    keys.sort(key=lambda key: key != ("basic", 0))  # what the others are compared with comes first
    with quiet():  # loading an IP-Adapter talks
        extractor = Extractor(
            model,
            [runs[name].steering for name in names],
            list(plan.layers),
            batch_size=batch_size_of(plan, len(images.samples)),
            height_px=plan.size_px[0],
            width_px=plan.size_px[1],
            precision="float32",
        )
    judge = _Judge(plan, extractor, images, names)
    progress.start("judging features", len(keys) * len(images.samples), "passes")
    try:
        for start in range(0, len(images.samples), extractor.batch_size):
            judge.batch(slice(start, start + extractor.batch_size), keys, progress)
    finally:
        progress.stop()
    return judge.scores()


class _Judge:
    """Shifts of all passes, filled batch by batch."""

    def __init__(self, plan: GatePlan, extractor: Extractor, images: Images, names: list[str]) -> None:
        self._plan, self._extractor, self._images, self._names = plan, extractor, images, names
        self._shifts: dict[bool, dict[Key, dict[str, list[Float64Array]]]] = {False: {}, True: {}}
        self._seconds: dict[str, float] = {}
        self._failed: dict[str, str] = {}

    def batch(self, rows: slice, keys: list[Key], progress: Progress) -> None:
        """All passes over some of the images."""
        latents = self._extractor.encode(self._images.pixels[rows])
        reference: dict[str, npt.NDArray[np.float32]] = {}
        for key in keys:
            maps = self._maps(key, rows, latents)
            reference = reference or maps
            for pattern, shifts in self._shifts.items():
                layers = shifts.setdefault(key, {})
                for layer, values in maps.items():
                    diff = content_shift.shift(reference[layer], values, pattern=pattern)
                    layers.setdefault(layer, []).append(diff)
            progress.advance(len(latents))

    def _maps(self, key: Key, rows: slice, latents: torch.Tensor) -> dict[str, npt.NDArray[np.float32]]:
        technique, timestep = key
        images, plan = self._images, self._plan
        keys = images.keys[rows]
        begin = time.perf_counter()
        maps, bad = self._extractor.run(
            self._names.index(technique),
            latents,
            images.seen[rows],
            images.digests[rows],
            timestep,
            plan.config.seed,
            plan.runs[technique].captions(plan.extract.dataset, keys),
        )
        seconds = (time.perf_counter() - begin) / len(keys)
        self._seconds[technique] = min(seconds, self._seconds.get(technique, seconds))
        found = {layer: np.array(values, dtype=np.float32) for layer, values in maps.items()}
        for row, reason in bad.items():
            self._failed.setdefault(keys[row], f"{technique} at t = {timestep}: {reason}")
            for values in found.values():
                values[row] = 0.0  # left out at the end; till then it must not spoil its batch
        return found

    def scores(self) -> Scores:
        """Everything against the anchor."""
        good = np.array([key not in self._failed for key in self._images.keys])
        require(int(good.sum()), self._failed)
        return Scores(
            layers=self._against_anchor(self._shifts[False], good),
            patterns=self._against_anchor(self._shifts[True], good),
            seconds_per_pass=self._seconds,
            good=good,
            failed=self._failed,
        )

    def _against_anchor(
        self, shifts: Mapping[Key, Mapping[str, list[Float64Array]]], good: npt.NDArray[np.bool_]
    ) -> dict[Key, dict[str, Float64Array]]:
        whole = {
            key: {layer: np.concatenate(parts)[good] for layer, parts in layers.items()}
            for key, layers in shifts.items()
        }
        anchors = whole[self._plan.anchor]
        return {
            key: {layer: content_shift.score(diff, anchors[layer]) for layer, diff in layers.items()}
            for key, layers in whole.items()
            if key[0] in self._plan.techniques
        }

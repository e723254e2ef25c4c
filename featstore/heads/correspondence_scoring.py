"""What a correspondence head finds in pairs whose points are known."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.heads.correspondence import CorrespondenceHead, Embedded, Matches, check_layers
from featstore.heads.correspondence_points import Grid
from featstore.heads.correspondence_reading import Held, PairReader
from featstore.heads.correspondence_task import CorrespondenceTask, shared
from featstore.heads.map_amalgamation import MapWeights
from featstore.metrics_correspondence import CorrespondenceMeter


def score_correspondence(task: CorrespondenceTask, head: CorrespondenceHead) -> dict[str, Any]:
    """What a head finds in the test pairs: the metrics of `CorrespondenceResult` without what is said of training.

    Raises:
        IncompatibleError: if the features are not of the layers that the head was trained on.
    """
    check_layers(head, task.features)
    meter, weights, counted = CorrespondenceMeter(), MapWeights(), set[int]()
    for (source, target), found, seen in _found(task, head):
        for row, embedded in seen.items():
            if row not in counted:
                counted.add(row)
                weights.update(embedded.weights)
        truth = task.points[target]
        _, there = shared(task.points[source], truth)
        meter.update(
            found.xy * np.array(truth.size_px[::-1], np.float32),
            truth.xy_px[there],
            size_px=truth.size_px,
            box_px=truth.box_px,
            category=truth.category,
        )
    return {
        **meter.compute().to_json(),
        "per_category": {name: scores.to_json() for name, scores in meter.by_category().items()},
        "assigner_weights": weights.to_json(),
        "test_images": len(counted),
    }


def _found(
    task: CorrespondenceTask, head: CorrespondenceHead
) -> Iterator[tuple[tuple[int, int], Matches, dict[int, Embedded]]]:
    """Each test pair, where its common points are found in the target, and both images."""
    reader = PairReader(features=task.features, window_bytes=head.config.window_bytes)
    pairs = task.test_pairs
    kept = _Kept(head)
    for visit, held in reader.read(pairs, reader.order(pairs, np.random.default_rng(0))):
        # target by target, so that each one's norms are taken once
        ordered = pairs[visit.pairs][np.lexsort(pairs[visit.pairs].T)]
        grid: tuple[int, Grid] | None = None
        for source, target in ordered.tolist():
            images = {row: kept.get(row, held) for row in (source, target)}
            if grid is None or grid[0] != target:
                grid = target, Grid(images[target].layers, head.grid)
            here, _ = shared(task.points[source], task.points[target])
            yield (source, target), head.find(images[source], grid[1], _places(task, source, here)), images


def _places(task: CorrespondenceTask, row: int, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(task.points[row].xy[numbers], np.float32)


class _Kept:
    """The images that were embedded last, as many as fit into the head's window."""

    def __init__(self, head: CorrespondenceHead) -> None:
        self._head = head
        self._images: OrderedDict[int, Embedded] = OrderedDict()

    def get(self, row: int, held: Held) -> Embedded:
        if row not in self._images:
            found = self._head.embed(held.maps(row))
            self._images[row] = found
            while len(self._images) > max(2, self._head.config.window_bytes // max(1, found.nbytes)):
                self._images.popitem(last=False)
        self._images.move_to_end(row)
        return self._images[row]

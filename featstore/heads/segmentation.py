"""Label-scarce segmentation: a pixel head trained on a few images, scored on the others.

K runs in the bucket, h w height and width of the label maps, M members, n assigners, T test images.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from featstore.errors import BadRequestError
from featstore.heads.features import Features
from featstore.heads.head import PixelHead, Prediction
from featstore.heads.pixels import PixelHeadConfig, member_generator
from featstore.heads.reading import Rows, read_rows, rows_by_block
from featstore.heads.sampled import PixelSample, SampledTables
from featstore.heads.tables import PixelTables
from featstore.heads.task import SegmentationTask
from featstore.heads.training import Progress, TrainingLog, train_members
from featstore.metrics import SegmentationMeter

LOG = logging.getLogger(__name__)

ALL_PIXELS = "all pixels"
"""Name of the assigners' mean weights over all test pixels, beside those of the classes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationResult:
    """A trained head and what it does on the test rows."""

    head: PixelHead
    """The trained head, on the device that it was trained on."""
    metrics: dict[str, Any]
    """Plain JSON: ``miou``, ``accuracy``, ``macc``, ``per_class`` (see `SegmentationScores.to_json`), ``member_miou``
    (M values), ``uncertainty`` (mean over test pixels, nats), ``absent_from_training`` (class names),
    ``train_images``, ``test_images``, ``steps`` (of each member); for two runs or more ``assigner_weights``: for
    `ALL_PIXELS` n lists of the mean weights of K runs, for each class that occurs one such list."""
    test_rows: npt.NDArray[np.int64]
    """(T,) rows of the arrays below, ascending."""
    predictions: npt.NDArray[np.uint8]
    """(T, h, w) uint8 predicted labels, majority vote."""
    uncertainty: npt.NDArray[np.float32]
    """(T, h, w) float32 Jensen-Shannon divergence of the members in nats, 0..ln(min(M, classes))."""
    weights: npt.NDArray[np.float32] | None
    """(M, n, K) float32: what each assigner chose, mean over test pixels; None for one run."""
    weights_by_class: npt.NDArray[np.float32] | None
    """(classes, K) float32: the same, mean over members, assigners and the test pixels of each class (NaN for none)."""
    log: TrainingLog | None
    """Steps and losses; None for a head that was only scored."""


def train_segmentation(
    task: SegmentationTask,
    config: PixelHeadConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    sample: PixelSample | None = None,
) -> SegmentationResult:
    """Train a pixel head on the training rows and score it on the test rows.

    A block of the arrays is read once for its training rows and once for its test rows, others never;
    no map is ever upsampled. On the CPU the result depends on
    task, configuration, seed and number of torch threads only.

    Args:
        task: features, labels and split.
        config: of the head and its training; None: the defaults.
        seed: of initial parameters and batches.
        device: where to train and predict.
        progress: called with steps done and steps at most (early stopping ends below that).
        sample: pixels of the training rows, whose maps are then not read; None: all their labelled pixels.

    Raises:
        BadRequestError: if arrays, labels and rows do not fit together, or no training pixel has a label.
        FeatstoreError: what the arrays' own tasks raise, such as NotCommittedError of a store.
    """
    config = PixelHeadConfig() if config is None else config
    spec = task.spec()
    if sample is None:
        flat = task.labels(task.train_rows).reshape(-1)
        named = np.flatnonzero(flat != task.ignore_label)
        truth = flat[named]
    else:
        truth, named = sample.labels, np.arange(len(sample.labels))
    if len(named) < 2:
        raise BadRequestError(
            f"the {len(task.train_rows)} training images have {len(named)} labelled pixels",
            hint="choose images with labels",
        )
    absent = [name for label, name in enumerate(task.classes) if not (truth == label).any()]
    if absent:
        LOG.warning("classes without a training pixel, which the head cannot learn: %s", ", ".join(absent))

    generators = [member_generator(seed, member) for member in range(config.members)]
    head = PixelHead.untrained(dataclasses.replace(spec, absent=tuple(absent)), config, generators).to(device)
    tables = _read(task.features, head, task.train_rows) if sample is None else SampledTables(sample, device)
    head.standardise.fit(*tables.moments())
    tables.standardise(head.standardise)
    log = train_members(
        head.members,
        tables,
        torch.from_numpy(named).to(device),
        torch.from_numpy(truth.astype(np.int64)).to(device),
        config,
        generators=generators,
        progress=progress,
    )
    del tables
    return score(task, head, log=log)


def predict_rows(features: Features, head: PixelHead, rows: Rows) -> Iterator[tuple[npt.NDArray[np.int64], Prediction]]:
    """Predict rows of lazy arrays block by block, so that memory holds one block's maps.

    Yields:
        Rows, ascending over all, and their prediction in that order.
    """
    ordered = np.unique(np.asarray(rows, np.int64))
    for part in rows_by_block(next(iter(features.maps[0].values())), ordered):
        yield ordered[part], head.predict_tables(_read(features, head, ordered[part]))


def _read(features: Features, head: PixelHead, rows: Rows) -> PixelTables:
    """The native maps of rows, in the order of ``rows``."""
    narrow = all(array.dtype == np.float16 for _, array in features.arrays())
    tables = head.tables(len(rows), torch.float16 if narrow else torch.float32)
    for run, (ref, layers) in enumerate(zip(head.features.runs, features.maps, strict=True)):
        for name, table in tables.layers.items():
            for positions, values in read_rows(layers[name], rows, what=f"layer {name} of run {ref.name}"):
                table.put(run, positions.tolist(), torch.from_numpy(values))
    beside = {f"{one.run.name}/{name}": array for one in features.beside for name, array in one.layers.items()}
    for name, table in tables.attention.items():
        for positions, values in read_rows(beside[name], rows, what=f"layer {name}"):
            table.put(0, positions.tolist(), torch.from_numpy(values))
    return tables


def score(task: SegmentationTask, head: PixelHead, *, log: TrainingLog | None = None) -> SegmentationResult:
    """What a trained head does on the test rows.

    Args:
        task: features, labels and test rows.
        head: trained on features of the same specification.
        log: of its training, where that has just been.
    """
    classes = head.spec.classes
    absent = head.spec.absent
    meter, *member_meters = (
        SegmentationMeter(classes, ignore_label=task.ignore_label, absent=absent)
        for _ in range(1 + head.members.members)
    )
    rows, labels, doubts, means = [], [], [], []
    sums = np.zeros((len(classes), len(head.features.runs)))
    counts = np.zeros(len(classes))
    for here, said in predict_rows(task.features, head, task.test_rows):
        truth = task.labels(here)
        meter.update(said.labels, truth)
        for one, member_labels in zip(member_meters, said.member_labels, strict=True):
            one.update(member_labels, truth)
        rows.append(here)
        labels.append(said.labels)
        doubts.append(said.uncertainty)
        if said.weights is not None and said.assigner_weights is not None:
            means.append(said.assigner_weights.astype(np.float64) * len(here))
            labelled = truth != task.ignore_label
            np.add.at(sums, truth[labelled], said.weights.transpose(0, 2, 3, 1)[labelled])
            counts += np.bincount(truth[labelled], minlength=len(classes))
    tested = np.concatenate(rows) if rows else np.empty(0, np.int64)
    size = head.spec.size
    uncertainty = np.concatenate(doubts) if doubts else np.empty((0, *size), np.float32)
    scores = meter.compute()
    metrics = {
        **scores.to_json(),
        "member_miou": [one.compute().miou for one in member_meters],
        "uncertainty": float(uncertainty.mean()) if uncertainty.size else None,
        "absent_from_training": list(absent),
        "train_images": len(task.train_rows),
        "test_images": len(tested),
        "steps": [] if log is None else list(log.steps),
    }
    if not len(tested):
        metrics.update(miou=None, accuracy=None, macc=None, member_miou=[None] * head.members.members)
    by_class = None
    if means:
        by_class = np.full(sums.shape, np.nan, np.float32)
        by_class[counts > 0] = (sums[counts > 0] / counts[counts > 0, None]).astype(np.float32)
    weights = (np.sum(means, 0) / len(tested)).astype(np.float32) if means else None
    if weights is not None and by_class is not None:
        named = {name: [row.tolist()] for name, row, n in zip(classes, by_class, counts, strict=True) if n}
        metrics["assigner_weights"] = {ALL_PIXELS: weights.mean(0).tolist(), **named}
    return SegmentationResult(
        head=head,
        metrics=metrics,
        test_rows=tested,
        predictions=np.concatenate(labels) if labels else np.empty((0, *size), np.uint8),
        uncertainty=uncertainty,
        weights=weights,
        weights_by_class=by_class,
        log=log,
    )

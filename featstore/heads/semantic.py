"""Semantic segmentation of whole images: a UPerNet head trained on batches of maps, scored on the test rows.

From Meng et al., NeurIPS 2024 (arXiv 2410.06719): cross-entropy and Lovász-softmax (Berman et al., CVPR 2018),
AdamW, labels as they are (the small-area rule belongs to label-scarce segmentation). Maps stream from their lazy
arrays, so memory does not depend on the number of images.

B images of a batch, h w height and width of the label grid.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import BadRequestError
from featstore.heads.features import Features
from featstore.heads.map_amalgamation import MapWeights, regulariser
from featstore.heads.reading import Rows, rows_by_block
from featstore.heads.stream import WINDOW_BYTES, Stream, read_maps
from featstore.heads.task import SegmentationTask
from featstore.heads.training import Progress
from featstore.heads.upernet import MapPrediction, UPerNetHead, UPerNetHeadConfig
from featstore.metrics import SegmentationMeter

LOG = logging.getLogger(__name__)

_LEAST_IMAGES = 2
"""Images of a step at least: UPerNet has batch norms over maps that are pooled to one pixel."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SemanticResult:
    """A trained head and what it does on the test rows."""

    head: UPerNetHead
    """The trained head, on the device that it was trained on."""
    metrics: dict[str, Any]
    """Plain JSON: ``miou``, ``accuracy``, ``macc``, ``per_class`` (see `SegmentationScores.to_json`), ``uncertainty``
    (mean entropy over test pixels, nats), ``absent_from_training`` (class names), ``train_images``, ``test_images``,
    ``steps``, ``loss`` (of the last step), and for two runs or more ``assigner_weights``: layer name to the mean
    weight of each run, one list an assigner."""


def train_semantic(
    task: SegmentationTask,
    config: UPerNetHeadConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    window_bytes: int = WINDOW_BYTES,
    progress: Progress | None = None,
) -> SemanticResult:
    """Train a UPerNet head on the training rows and score it on the test rows.

    On the CPU the result depends on task, configuration, seed, ``window_bytes`` and number of torch threads only.

    Args:
        task: features, labels and split.
        config: of the head and its training; None: the defaults.
        seed: of initial parameters and batches.
        device: where to train and predict.
        window_bytes: bytes of blocks that are shuffled together; twice as many are held.
        progress: called with steps done and steps at most.

    Raises:
        BadRequestError: if arrays, labels and rows do not fit together, fewer than two training images are labelled,
            or the loss does not stay finite.
        FeatstoreError: what the arrays' own tasks raise, such as NotCommittedError of a store.
    """
    config = UPerNetHeadConfig() if config is None else config
    spec = task.spec()
    rows, present = _labelled(task)
    if len(rows) < _LEAST_IMAGES:
        raise BadRequestError(
            f"{len(rows)} of the {len(task.train_rows)} training images have labelled pixels; "
            f"a step of UPerNet takes {_LEAST_IMAGES} at least",
            hint="choose images with labels",
        )
    absent = [name for name, there in zip(task.classes, present, strict=True) if not there]
    if absent:
        LOG.warning("classes without a training pixel, which the head cannot learn: %s", ", ".join(absent))
    head = UPerNetHead(dataclasses.replace(spec, absent=tuple(absent)), config, _generator(seed)).to(device)
    stream = Stream(
        features=task.features, rows=rows, batch=min(config.batch_size, len(rows)), seed=seed, window_bytes=window_bytes
    )
    enough = -(-config.statistics_images // stream.batch)
    head.standardise.fit(itertools.islice(stream.epoch(0), enough))
    steps, loss = _train(task, head, stream, progress)
    return score(task, head, steps=steps, loss=loss)


def _train(task: SegmentationTask, head: UPerNetHead, stream: Stream, progress: Progress | None) -> tuple[int, float]:
    """Train in place: steps taken, and the last one's loss."""
    config = head.config
    whole, rest = divmod(len(stream.rows), stream.batch)
    most = config.max_steps or min(config.steps, config.max_epochs * (whole + (rest >= _LEAST_IMAGES)))
    parameters = [value for module in head.modules.values() for value in module.parameters()]
    adam = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.PolynomialLR(adam, total_iters=most, power=config.decay_power)
    head.train()
    step, found = 0, torch.zeros(())
    batches = (maps for epoch in itertools.count() for maps in stream.epoch(epoch))
    for maps in batches:
        if len(maps.rows) < _LEAST_IMAGES:  # the rest of an epoch
            continue
        logits, weights = head.logits(maps)
        labels = torch.from_numpy(_masks(task, maps.rows)).to(head.device, torch.int64)
        found = segmentation_loss(logits, labels, lovasz=config.lovasz, ignore_label=task.ignore_label)
        objective = found + regulariser(weights, config.gamma1, config.gamma2).to(head.device)
        adam.zero_grad(set_to_none=True)
        objective.backward()  # type: ignore[no-untyped-call]
        adam.step()
        schedule.step()
        step += 1
        if progress is not None:
            progress(step, most)
        if step == most:
            break
    batches.close()
    head.train(False)
    loss = float(found.detach())
    if not math.isfinite(loss):
        raise BadRequestError(
            f"the loss is {loss} after {step} steps",
            hint="train with another seed or fewer steps; from Python, with a smaller learning_rate",
        )
    return step, loss


def segmentation_loss(logits: Tensor, labels: Tensor, *, lovasz: float, ignore_label: int) -> Tensor:
    """Cross-entropy, and ``lovasz`` times the Lovász-softmax loss over all pixels of the batch.

    Args:
        logits: (B, classes, h, w) float32.
        labels: (B, h, w) int64, at least one of them not ``ignore_label``.
        lovasz: factor of the Lovász-softmax loss, which is the mean over the classes in ``labels``.
        ignore_label: label of pixels that do not count.

    Returns:
        () float32.
    """
    loss = functional.cross_entropy(logits, labels, ignore_index=ignore_label)
    if lovasz:
        # here, because the package brings all its encoders: a second to import
        from segmentation_models_pytorch.losses import LovaszLoss

        loss = loss + lovasz * LovaszLoss("multiclass", per_image=False, ignore_index=ignore_label)(logits, labels)
    return loss


def predict_rows(
    features: Features, head: UPerNetHead, rows: Rows
) -> Iterator[tuple[npt.NDArray[np.int64], MapPrediction]]:
    """Predict rows of lazy arrays, a training batch's number of images at a time.

    Yields:
        Rows, ascending over all, and their prediction in that order.
    """
    ordered = np.unique(np.asarray(rows, np.int64))
    for part in rows_by_block(next(iter(features.maps[0].values())), ordered):
        maps = read_maps(features, ordered[part])
        for start in range(0, len(part), head.config.batch_size):
            some = maps.take(np.arange(start, min(start + head.config.batch_size, len(part))))
            yield some.rows, head.predict_maps(some)


def score(task: SegmentationTask, head: UPerNetHead, *, steps: int = 0, loss: float | None = None) -> SemanticResult:
    """What a trained head does on the test rows.

    Args:
        task: features, labels and test rows.
        head: trained on features of the same specification.
        steps: of its training, where that has just been.
        loss: of its last step.
    """
    meter = SegmentationMeter(head.spec.classes, ignore_label=task.ignore_label, absent=head.spec.absent)
    chosen = MapWeights()
    tested, doubt = 0, 0.0
    for rows, said in predict_rows(task.features, head, task.test_rows):
        meter.update(said.labels, _masks(task, rows))
        chosen.update(said.weights)
        tested += len(rows)
        doubt += float(said.uncertainty.mean(dtype=np.float64)) * len(rows)
    metrics = {
        **meter.compute().to_json(),
        "uncertainty": doubt / tested if tested else None,
        "absent_from_training": list(head.spec.absent),
        "train_images": len(task.train_rows),
        "test_images": tested,
        "steps": steps,
        "loss": loss,
    }
    if not tested:
        metrics.update(miou=None, accuracy=None, macc=None)
    if len(head.features.runs) > 1:
        metrics["assigner_weights"] = chosen.to_json()
    return SemanticResult(head=head, metrics=metrics)


def _labelled(task: SegmentationTask) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Training rows with a labelled pixel, and which classes have one in them."""
    pixels = np.zeros(256, np.int64)
    rows = []
    for row in task.train_rows:
        counts = np.bincount(task.masks[row].reshape(-1), minlength=256)
        counts[task.ignore_label] = 0
        if counts.any():
            rows.append(int(row))
            pixels += counts
    return np.array(rows, np.int64), pixels[: len(task.classes)] > 0


def _masks(task: SegmentationTask, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """(len(rows), h, w) uint8 labels."""
    return np.stack([task.masks[int(row)] for row in rows])


def _generator(seed: int) -> torch.Generator:
    """The source of the initial parameters."""
    digest = hashlib.sha256(f"featstore upernet head {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

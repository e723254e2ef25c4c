"""Classification: a head trained on labelled images, scored on others.

K runs in the bucket, n assigners, T test images, c classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import BadRequestError
from featstore.heads.classification import ClassificationConfig, ClassificationHead, head_generator
from featstore.heads.classification_batches import MapBatches, VectorBatches
from featstore.heads.classification_task import ClassificationTask
from featstore.heads.map_amalgamation import MapWeights, regulariser
from featstore.heads.stream import WINDOW_BYTES, Stream
from featstore.metrics_classification import classification_scores

LOG = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with steps done and steps at most."""
Batch = tuple[npt.NDArray[np.int64], Tensor, dict[str, Tensor]]
"""Rows (B,), vectors (B, D) and the assigners' weights of a step."""

_PROGRESS_STEPS = 10


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationResult:
    """A trained head and what it does on the test rows."""

    head: ClassificationHead
    """The trained head, on the device that it was trained on."""
    metrics: dict[str, Any]
    """Plain JSON: what `ClassificationScores.to_json` has, ``absent_from_training`` (class names),
    ``train_images``, ``test_images``, ``steps``, ``loss`` (cross-entropy of the last batch, nats; None for a head that
    was only scored) and, for two runs or more, ``assigner_weights``: layer name to n lists of the mean weights of K
    runs on the test images."""
    test_rows: npt.NDArray[np.int64]
    """(T,) rows of the arrays below, ascending."""
    probabilities: npt.NDArray[np.float32]
    """(T, c) float32 in 0..1, sums to 1 over classes."""

    @property
    def predictions(self) -> npt.NDArray[np.int64]:
        """(T,) int64: the most probable class."""
        labels: npt.NDArray[np.int64] = self.probabilities.argmax(1)
        return labels


def train_classification(
    task: ClassificationTask,
    config: ClassificationConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    window_bytes: int = WINDOW_BYTES,
) -> ClassificationResult:
    """Train a head on the training rows and score it on the test rows.

    Where the training maps fit into ``window_bytes`` they are read once, else they are streamed in every epoch, in
    the same batches; a linear layer on a single run reads them twice in all, for their scale and their means. On the
    CPU the result depends on task, configuration, seed and number of torch threads only.

    Args:
        task: features, labels and split.
        config: of the head and its training; None: the defaults.
        seed: of initial parameters and batches.
        device: where to train and predict.
        progress: called with steps done and steps at most.
        window_bytes: bytes of maps that may be kept; a stream holds two windows of this size.

    Raises:
        BadRequestError: if arrays, labels and rows do not fit together, or all training images are of one class.
        FeatstoreError: what the arrays' own tasks raise, such as NotCommittedError of a store.
    """
    config = ClassificationConfig() if config is None else config
    task.check_training()
    if absent := task.absent():
        LOG.warning("classes without a training image, which the head cannot learn: %s", ", ".join(absent))
    head = ClassificationHead(task.features.spec(), task.classes, config, head_generator(seed)).to(device)
    maps = MapBatches(task.features, task.train_rows, batch=config.batch_size, seed=seed, window_bytes=window_bytes)
    head.net.standardise.fit(maps.epoch(0))
    steps = config.steps(maps.count)
    labels = torch.from_numpy(task.labels.astype(np.int64))
    with contextlib.closing(_batches(head, maps)) as batches:  # a stream left in the middle still has a thread
        loss = _descend(head, batches, labels, steps, progress)
    del maps
    return score_classification(
        task, head, steps=steps, loss=loss, absent_from_training=absent, window_bytes=window_bytes
    )


def _batches(head: ClassificationHead, maps: MapBatches) -> Generator[Batch, None, None]:
    """The vectors of one batch after the other, without end; `fit_vectors` has seen all of them before the first."""
    net = head.net
    rows, vectors = [], []
    if net.settled or head.config.form == "linear":
        with torch.no_grad():
            for batch in maps.epoch(0):
                rows.append(batch.rows)
                vectors.append(net.vectors(batch)[0])
        net.fit_vectors(vectors)
    fixed = VectorBatches(maps, np.concatenate(rows), torch.cat(vectors)) if net.settled else None
    epoch = 0
    while True:
        if fixed is not None:
            yield from ((rows_, vectors_, {}) for rows_, vectors_ in fixed.epoch(epoch))
        else:
            yield from ((batch.rows, *net.vectors(batch)) for batch in maps.epoch(epoch))
        epoch += 1


def _descend(
    head: ClassificationHead,
    batches: Generator[Batch, None, None],
    labels: Tensor,
    steps: int,
    progress: Progress | None,
) -> float:
    """Train in place for some steps; returns the cross-entropy of the last batch in nats."""
    net, config = head.net.train(), head.config
    adam = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    loss = torch.tensor(math.nan)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = config.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        rows, vectors, weights = next(batches)
        truth = labels[torch.from_numpy(rows)].to(vectors.device)
        loss = functional.cross_entropy(net.scores(vectors), truth, label_smoothing=config.label_smoothing)
        objective = loss + regulariser(weights, config.gamma1, config.gamma2) if weights else loss
        adam.zero_grad(set_to_none=True)
        objective.backward()  # type: ignore[no-untyped-call]
        adam.step()
        if progress is not None and (step + 1) % _PROGRESS_STEPS == 0:
            progress(step + 1, steps)
    net.eval()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise BadRequestError(f"the loss is {value} after {steps} steps", hint="train with a smaller learning rate")
    if progress is not None:
        progress(steps, steps)
    return value


def score_classification(
    task: ClassificationTask,
    head: ClassificationHead,
    *,
    steps: int | None = None,
    loss: float | None = None,
    absent_from_training: Sequence[str] = (),
    window_bytes: int = WINDOW_BYTES,
) -> ClassificationResult:
    """What a trained head does on the test rows.

    Args:
        task: features, labels and test rows.
        head: trained on features of the same specification.
        steps: of its training, where that has just been.
        loss: at the end of its training.
        absent_from_training: names of the classes that it was not trained on.
        window_bytes: bytes of maps that may be held at once, twice.

    Raises:
        BadRequestError: if arrays, labels and rows do not fit together.
    """
    task.check()
    rows = np.unique(np.asarray(task.test_rows, np.int64))
    probabilities = np.empty((len(rows), len(head.classes)), np.float32)
    chosen = MapWeights()
    stream = Stream(features=task.features, rows=rows, batch=head.config.batch_size, window_bytes=window_bytes)
    with torch.inference_mode():
        for maps in stream.epoch(0):
            vectors, weights = head.net.vectors(maps)
            said = head.net.scores(vectors).softmax(1)
            probabilities[np.searchsorted(rows, maps.rows)] = said.cpu().numpy()
            chosen.update(weights)
    scores = classification_scores(probabilities, task.labels[rows].astype(np.int64), head.classes)
    metrics = {
        **scores.to_json(),
        "absent_from_training": list(absent_from_training),
        "train_images": len(np.unique(np.asarray(task.train_rows, np.int64))),
        "test_images": len(rows),
        "steps": steps,
        "loss": loss,
    }
    if len(head.features.runs) > 1:
        metrics["assigner_weights"] = chosen.to_json()
    return ClassificationResult(head=head, metrics=metrics, test_rows=rows, probabilities=probabilities)

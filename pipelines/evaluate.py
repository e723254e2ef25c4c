"""A trained head scored again, on its data set or on another with the same classes and runs."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from featstore.errors import BadRequestError, unknown_name
from featstore.pipelines.device import resolve_device
from featstore.pipelines.head_use import open_head
from featstore.pipelines.memory import peak_rss_bytes
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.tasks.base import LabelledRows


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Which head to score, and on what."""

    head: Path
    """Its folder."""
    store: str = "features.zarr"
    """URL of the store that holds the features."""
    dataset: str | None = None
    """Data set to score on; None: the one that the head was trained on."""
    dataset_name: str | None = None
    """Its name in the store; None: its own."""
    data_root: Path | None = None
    """Where data sets lie."""
    split: str | None = None
    """Images to score on; None: ``test``, or ``val`` where there is no ``test``."""
    skip_missing: bool = False
    """Leave out images without features instead of refusing."""
    device: str | None = None
    """Device; None: a GPU where there is one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateReport:
    """What a head scores; `to_json` is what ``--json`` prints."""

    task: str
    dataset: str
    split: str
    images: int
    """Images that were scored."""
    summary: dict[str, float]
    """The task's own metrics, 0..1."""
    metrics: dict[str, Any]
    """Everything that was scored."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        return {
            "task": self.task,
            "dataset": self.dataset,
            "split": self.split,
            "images": self.images,
            "metrics": self.summary,
            "details": self.metrics,
            "seconds": self.seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }


def evaluate(config: EvaluateConfig, progress: Progress | None = None) -> EvaluateReport:
    """Score a head on one split of a data set.

    Raises:
        NotFoundError: if there is no head.
        IncompatibleError: if the store's runs, or the classes, are not those that it was trained on.
        NotCommittedError: if features are missing, with the command that extracts them.
    """
    start = time.perf_counter()
    progress = progress or Silent()
    device = resolve_device(config.device)
    opened = open_head(config.head)
    changes: dict[str, Any] = {"store": config.store, "data_root": config.data_root}
    if config.dataset is not None:
        changes |= {"dataset": config.dataset, "dataset_name": config.dataset_name}
    bucket_config = opened.bucket_config(**changes)
    bucket = opened.open_bucket(bucket_config)
    names = np.array(bucket.stored.samples.splits)
    split = config.split or ("test" if (names == "test").any() else "val")
    if not (names == split).any():
        raise unknown_name("split", split, sorted(set(names.tolist())))
    prepared = opened.kind.prepare(
        bucket, LabelledRows(config=bucket_config, skip_missing=config.skip_missing, split=split), progress
    )
    rows = np.flatnonzero(prepared.usable & (names == split))
    if not len(rows):
        raise BadRequestError(f"no image of split {split!r} has labels and features")
    own = bucket.stored.name == opened.made["dataset_in_store"]
    if own and split == "train":
        progress.note("the head was trained on these images: the scores say how well it remembers")
    metrics = prepared.score(opened.load(device), rows, progress)
    return EvaluateReport(
        task=opened.task,
        dataset=bucket.stored.name,
        split=split,
        images=len(rows),
        summary={name: metrics[name] for name in opened.kind.metrics if metrics[name] is not None},
        metrics=metrics,
        seconds=time.perf_counter() - start,
    )

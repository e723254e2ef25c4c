"""Heads trained from a store only: no diffusion model is loaded, no weights are looked for."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.errors import unknown_name
from featstore.heads.splits import splits as make_splits
from featstore.pipelines.device import resolve_device
from featstore.pipelines.extract import peak_rss_bytes
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.reading import BucketConfig, open_bucket
from featstore.pipelines.tasks import TASKS
from featstore.pipelines.tasks.base import HeadSettings, LabelledRows, Result

if TYPE_CHECKING:
    from featstore.store.cached import CacheUse


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainHeadConfig:
    """What to train, on which features."""

    bucket: BucketConfig
    """The runs; several are amalgamated."""
    task: str = "segmentation"
    """What to train for."""
    head: str | None = None
    """Which of the task's heads; None: its first."""
    assigners: int = 3
    """Weight assigners, where there are several runs."""
    per_channel: bool = False
    """Whether an assigner weighs each channel apart, and not each run as a whole."""
    ensemble: int = 10
    """Members of the head."""
    splits: int = 5
    """Splits to train and score on; the first is the data set's own, the others are drawn at random."""
    max_steps: int | None = None
    """Steps at most; None: until the loss stops improving."""
    skip_missing: bool = False
    """Leave out images without features instead of refusing."""
    device: str | None = None
    """Device; None: a GPU where there is one."""
    out: Path | None = None
    """Folder of the head trained on the first split; None: it is not written."""
    seed: int = 0
    """Seed of splits, initial weights and batches."""

    def __post_init__(self) -> None:
        """Refuse an unknown task or head."""
        heads = TASKS[self.task].heads
        if self.head is not None and self.head not in heads:
            raise unknown_name(f"head for {self.task}", self.head, heads)

    def settings(self) -> HeadSettings:
        """The part of this that a task needs for building and training a head."""
        return HeadSettings(
            head=self.head or TASKS[self.task].heads[0],
            assigners=self.assigners,
            per_channel=self.per_channel,
            ensemble=self.ensemble,
            max_steps=self.max_steps,
            seed=self.seed,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric over the splits, 0..1."""

    mean: float
    std: float
    """Sample standard deviation over the splits; 0 for one split."""
    splits: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Metric:
        """Summarise the values of the splits."""
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(mean=statistics.fmean(values), std=std, splits=tuple(values))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainHeadReport:
    """What a training gave; `to_json` is what ``--json`` prints."""

    dataset: str
    techniques: str
    task: str
    metrics: dict[str, Metric]
    results: tuple[Any, ...]
    """The task's own result of each split (`featstore.pipelines.tasks.base.Result`)."""
    seconds: float
    head: Path | None
    cache_use: CacheUse | None = None
    """What a cache saved; None without one."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        first = self.results[0].metrics
        return {
            "task": self.task,
            "dataset": self.dataset,
            "techniques": self.techniques,
            "metrics": {name: dataclasses.asdict(metric) for name, metric in self.metrics.items()},
            **({"per_class": first["per_class"]} if "per_class" in first else {}),
            "seconds": self.seconds,
            "peak_rss_bytes": peak_rss_bytes(),
            "head": None if self.head is None else str(self.head),
        }


def train_head(config: TrainHeadConfig, progress: Progress | None = None) -> TrainHeadReport:
    """Train one head a split and score it on the split's test images.

    Raises:
        NotCommittedError: if features are missing, with the command that extracts them.
        BadRequestError: for a data set without labels or classes, and unknown names.
    """
    start = time.perf_counter()
    progress = progress or Silent()
    kind = TASKS[config.task]
    bucket = open_bucket(config.bucket)
    settings = dataclasses.replace(config.settings(), device=resolve_device(config.device))
    rows = LabelledRows(config=config.bucket, skip_missing=config.skip_missing)
    prepared = kind.prepare(bucket, rows, progress)
    names = bucket.stored.samples.splits
    chosen = make_splits(config.splits, names, usable=prepared.usable.tolist(), seed=config.seed)
    results = [
        prepared.train(split, settings, progress, f"training, split {number + 1} of {len(chosen)}")
        for number, split in enumerate(chosen)
    ]
    metrics = {name: Metric.of([result.metrics[name] for result in results]) for name in kind.metrics}
    return TrainHeadReport(
        dataset=bucket.stored.name,
        techniques=config.bucket.techniques,
        task=config.task,
        metrics=metrics,
        results=tuple(results),
        seconds=time.perf_counter() - start,
        head=None if config.out is None else _save(config, config.out, results[0], metrics),
        cache_use=bucket.cache_use,
    )


def _save(config: TrainHeadConfig, out: Path, result: Result, metrics: dict[str, Metric]) -> Path:
    from featstore.heads import save_head

    summary = {name: dataclasses.asdict(metric) for name, metric in metrics.items()}
    extra = {
        "task": config.task,
        "dataset": config.bucket.dataset,
        "techniques": config.bucket.techniques,
        "timesteps": list(config.bucket.timesteps),
        "seed": config.seed,
    }
    return save_head(out, result.head, metrics={"splits": summary, "first_split": result.metrics}, extra=extra)

"""Heads trained from a store only: no diffusion model is loaded, no weights are looked for."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore.datasets import UnreadableImageError, resize_mask
from featstore.errors import BadRequestError, NotCommittedError, unknown_name
from featstore.heads.splits import splits as make_splits
from featstore.pipelines.device import resolve_device
from featstore.pipelines.extract import peak_rss_bytes
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.reading import BucketConfig, OpenBucket, open_bucket

if TYPE_CHECKING:
    from featstore.heads import SegmentationResult
    from featstore.store.cached import CacheUse

TASKS = ("segmentation",)
METRICS = ("miou", "accuracy")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainHeadConfig:
    """What to train, on which features."""

    bucket: BucketConfig
    """The runs; several are amalgamated."""
    task: str = "segmentation"
    """What to train for."""
    assigners: int = 3
    """Weight assigners, where there are several runs."""
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
        """Refuse an unknown task."""
        if self.task not in TASKS:
            raise unknown_name("task", self.task, TASKS)


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
    results: tuple[SegmentationResult, ...]
    """The result of each split."""
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
            "per_class": first["per_class"],
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
    bucket = open_bucket(config.bucket)
    device = resolve_device(config.device)
    labels = _labels(bucket, progress)
    bucket = dataclasses.replace(bucket, classes=_classes(bucket, labels))
    usable = _usable(bucket, labels, config, progress)
    masks = _grid(bucket, labels, usable)
    chosen = make_splits(config.splits, bucket.stored.samples.splits, usable=usable.tolist(), seed=config.seed)
    results = [
        _train(bucket, masks, usable, split, config, device, progress, f"split {number + 1} of {len(chosen)}")
        for number, split in enumerate(chosen)
    ]
    metrics = {name: Metric.of([result.metrics[name] for result in results]) for name in METRICS}
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


def _labels(bucket: OpenBucket, progress: Progress) -> dict[str, np.ndarray]:
    """Label maps uint8 by key, on the grid that heads are trained and scored on, where an image has one."""
    info, recipe = bucket.dataset.info, bucket.runs[0].recipe
    height, width = (info.label_size_px,) * 2 if info.label_size_px else (recipe.height_px, recipe.width_px)
    labels = {}
    for sample in bucket.dataset.samples:
        try:
            mask = bucket.dataset.mask(sample.key)
        except UnreadableImageError as error:
            progress.note(f"left out: the labels of {sample.key!r} cannot be read: {error}")
            continue
        if mask is not None:
            labels[sample.key] = resize_mask(mask, height, width)
    if not labels:
        raise BadRequestError(
            f"data set {info.name!r} has no labels",
            hint="put masks beside the images: IMAGE.npy, IMAGE_mask.png or a folder masks/",
        )
    return labels


def _classes(bucket: OpenBucket, labels: dict[str, np.ndarray]) -> tuple[str, ...]:
    """The data set's class names; where it has none, as folders, 0, 1, .. up to the highest label."""
    ignore = bucket.dataset.info.ignore_label
    highest = {key: int(mask[mask != ignore].max(initial=0)) for key, mask in labels.items()}
    classes = bucket.dataset.info.classes or tuple(map(str, range(max(highest.values()) + 1)))
    for key, label in highest.items():
        if label >= len(classes):
            raise BadRequestError(
                f"the labels of {key!r} hold {label}, which is outside 0..{len(classes) - 1} and not {ignore}",
                hint=f"data set {bucket.dataset.info.name!r} has {len(classes)} classes",
            )
    return classes


def _usable(
    bucket: OpenBucket, labels: dict[str, np.ndarray], config: TrainHeadConfig, progress: Progress
) -> np.ndarray:
    """Mask (N,) over the store's rows: True where an image has labels and features.

    Raises:
        NotCommittedError: if features of labelled images are missing and may not be left out.
    """
    missing = bucket.missing(list(labels))
    if missing:
        text = (
            f"features of {len(missing)} of {len(labels)} labelled images are missing or stale, e.g. of {missing[0]!r}"
        )
        if not config.skip_missing:
            hint = f"run: {bucket.extract_command(config.bucket)} (or leave them out with --skip-missing)"
            raise NotCommittedError(text, hint=hint)
        progress.note(f"left out: {text}")
    there = labels.keys() - set(missing)
    return np.array([key in there for key in bucket.stored.samples.keys], dtype=bool)


def _grid(bucket: OpenBucket, labels: dict[str, np.ndarray], usable: np.ndarray) -> np.ndarray:
    """Label maps (N, h, w) uint8 of the store's rows; the ignored label where a row is not usable."""
    height, width = next(iter(labels.values())).shape
    masks = np.full((len(usable), height, width), bucket.dataset.info.ignore_label, dtype=np.uint8)
    for row in np.flatnonzero(usable):
        masks[row] = labels[bucket.stored.samples.keys[row]]
    return masks


def _train(
    bucket: OpenBucket,
    masks: np.ndarray,
    usable: np.ndarray,
    split: tuple[np.ndarray, np.ndarray],
    config: TrainHeadConfig,
    device: str,
    progress: Progress,
    title: str,
) -> SegmentationResult:
    from featstore.heads import PixelHeadConfig, RunRef, Task, train_segmentation

    references = [
        RunRef(name=name, fingerprint=run.fingerprint) for name, run in zip(bucket.titles, bucket.runs, strict=True)
    ]
    steered = bucket.runs[bucket.most_steered]
    task = Task(
        maps=[{name: run.lazy(name, usable) for name in bucket.maps} for run in bucket.runs],
        attention={name: steered.lazy(name, usable) for name in bucket.attention},
        masks=masks,
        train_rows=split[0].tolist(),
        test_rows=split[1].tolist(),
        classes=bucket.classes,
        runs=references,
        attention_run=references[bucket.most_steered],
        ignore_label=bucket.dataset.info.ignore_label,
    )
    head = PixelHeadConfig(members=config.ensemble, assigners=config.assigners, max_steps=config.max_steps)
    done = 0

    def advance(steps: int, most: int) -> None:
        nonlocal done
        if done == 0:
            progress.start(f"training, {title}", most, "steps")
        progress.advance(steps - done)
        done = steps

    try:
        return train_segmentation(task, head, seed=config.seed, device=device, progress=advance)
    finally:
        progress.stop()


def _save(config: TrainHeadConfig, out: Path, result: SegmentationResult, metrics: dict[str, Metric]) -> Path:
    from featstore.heads import save_head

    summary = {name: dataclasses.asdict(metric) for name, metric in metrics.items()}
    extra = {
        "dataset": config.bucket.dataset,
        "techniques": config.bucket.techniques,
        "timesteps": list(config.bucket.timesteps),
        "seed": config.seed,
    }
    return save_head(out, result.head, metrics={"splits": summary, "first_split": result.metrics}, extra=extra)

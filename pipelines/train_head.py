"""Heads trained from a store only: no diffusion model is loaded, no weights are looked for."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore import pictures
from featstore.errors import BadRequestError, unknown_name
from featstore.heads.splits import splits as make_splits
from featstore.pipelines.baseline import BaselineConfig
from featstore.pipelines.cluster.config import ClusterConfig, check_store
from featstore.pipelines.cluster.opening import open_cluster
from featstore.pipelines.device import resolve_device
from featstore.pipelines.memory import peak_rss_bytes
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.reading import BucketConfig, OpenBucket, open_bucket
from featstore.pipelines.tasks import TASKS
from featstore.pipelines.tasks.base import HeadSettings, LabelledRows, Result

if TYPE_CHECKING:
    from featstore.store.cached import CacheUse


PIXEL_HEAD = "pixel"
"""The head that holds its training images, or some of their pixels."""
ASSIGNERS = "assigners.png"
"""Picture of what the assigners chose, beside the files of a head that amalgamates."""


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
    pixels_per_image: int | None = None
    """Labelled pixels of each training image that a pixel head gets, for many images; None: all of them."""
    cluster: ClusterConfig | None = None
    """Processes that gather those pixels; None: this one."""
    baseline: BaselineConfig | None = None
    """A network that is trained on the images themselves, on the same splits, to compare with; None: none."""

    def __post_init__(self) -> None:
        """Refuse an unknown task, head or baseline, and options that do not go together."""
        heads, baselines = TASKS[self.task].heads, TASKS[self.task].baselines
        if self.baseline is not None and self.baseline.name not in baselines:
            those = ", ".join(name for name, kind in TASKS.items() if self.baseline.name in kind.baselines)
            raise BadRequestError(
                f"{self.task} has no baseline {self.baseline.name!r}", hint=f"leave it out, or train for {those}"
            )
        if self.head is not None and self.head not in heads:
            raise unknown_name(f"head for {self.task}", self.head, heads)
        if self.pixels_per_image is not None:
            if self.pixels_per_image < 1:
                raise BadRequestError(f"{self.pixels_per_image} pixels of an image; 1 or more are needed")
            if (self.head or heads[0]) != PIXEL_HEAD:
                raise BadRequestError(
                    f"--pixels-per-image {self.pixels_per_image} is for the {PIXEL_HEAD!r} head, "
                    f"not for {self.head or heads[0]!r}",
                    hint="leave it out: this head reads its maps in batches",
                )
        if self.cluster is not None and self.cluster.asked:
            check_store(self.bucket.store)
            if self.pixels_per_image is None:
                raise BadRequestError(
                    "--workers and --scheduler gather pixels, and without --pixels-per-image there are none to gather",
                    hint="add --pixels-per-image 256, or leave them out: whole maps are read where the head is trained",
                )

    def settings(self) -> HeadSettings:
        """The part of this that a task needs for building and training a head."""
        return HeadSettings(
            head=self.head or TASKS[self.task].heads[0],
            assigners=self.assigners,
            per_channel=self.per_channel,
            ensemble=self.ensemble,
            max_steps=self.max_steps,
            seed=self.seed,
            pixels_per_image=self.pixels_per_image,
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
    baseline: dict[str, Metric] = dataclasses.field(default_factory=dict)
    """What the baseline scores; empty without one."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        first = self.results[0].metrics
        return {
            "task": self.task,
            "dataset": self.dataset,
            "techniques": self.techniques,
            "metrics": {name: dataclasses.asdict(metric) for name, metric in self.metrics.items()},
            **{name: first[name] for name in ("per_class", "per_category") if name in first},
            **({"baseline": {n: dataclasses.asdict(m) for n, m in self.baseline.items()}} if self.baseline else {}),
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
    with open_cluster(config.cluster, progress, store=config.bucket.store) as cluster:
        settings = dataclasses.replace(settings, cluster=cluster)
        results = [
            prepared.train(split, settings, progress, f"training, split {number + 1} of {len(chosen)}")
            for number, split in enumerate(chosen)
        ]
    metrics = summary(kind.metrics, [result.metrics for result in results])
    compared = []
    if config.baseline is not None:
        baseline = dataclasses.replace(config.baseline, max_steps=config.max_steps)
        for number, split in enumerate(chosen):
            title = f"{baseline.name}, split {number + 1} of {len(chosen)}"
            compared.append(prepared.baseline(split, baseline, settings, progress, title))
    return TrainHeadReport(
        dataset=bucket.stored.name,
        techniques=config.bucket.techniques,
        task=config.task,
        metrics=metrics,
        results=tuple(results),
        seconds=time.perf_counter() - start,
        head=None if config.out is None else _save(config, config.out, bucket, results[0], metrics),
        cache_use=bucket.cache_use,
        baseline=summary(kind.metrics, compared),
    )


def summary(names: Sequence[str], splits: Sequence[Mapping[str, Any]]) -> dict[str, Metric]:
    """Each metric over those splits where it has a value (one test image has no ROC curve); left out if none has."""
    values = {name: [one[name] for one in splits if one[name] is not None] for name in names}
    return {name: Metric.of(found) for name, found in values.items() if found}


def _save(config: TrainHeadConfig, out: Path, bucket: OpenBucket, result: Result, metrics: dict[str, Metric]) -> Path:
    """Write the head with all that finding, or making, its features again takes."""
    from featstore.heads import save_head

    scores = {name: dataclasses.asdict(metric) for name, metric in metrics.items()}
    asked, splits = config.bucket, set(bucket.stored.samples.splits)
    extra = {
        "task": config.task,
        "dataset": asked.dataset,
        "dataset_name": asked.dataset_name,
        "dataset_in_store": bucket.stored.name,
        "info": {**dataclasses.asdict(bucket.dataset.info), "classes": list(bucket.classes)},
        "test_split": "test" if "test" in splits else "val",
        "model": asked.model,
        "techniques": asked.techniques,
        "timesteps": list(asked.timesteps),
        "beside": [dataclasses.asdict(one.config()) for one in bucket.beside],
        "beside_recipes": [one.run.recipe.to_json() for one in bucket.beside],
        "recipes": [run.recipe.to_json() for run in bucket.runs],
        "seed": config.seed,
        "pixels_per_image": config.pixels_per_image,
    }
    chosen = result.metrics.get("assigner_weights")
    if chosen and len(bucket.runs) > 1:
        pictures.save_assigners(out / ASSIGNERS, chosen, bucket.titles, title=f"{bucket.stored.name}: {config.task}")
    return save_head(out, result.head, metrics={"splits": scores, "first_split": result.metrics}, extra=extra)

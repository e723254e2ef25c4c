"""What is asked of an experiment, and what its plan says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featstore.errors import unknown_name
from featstore.pipelines.experiment.settings import ExperimentFile, Setting
from featstore.pipelines.plan import Plan
from featstore.pipelines.reading import BucketConfig
from featstore.pipelines.train_head import Metric, TrainHeadConfig

TRAINED = "trained"
"""Folder of the scores of single settings below ``out``."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentConfig:
    """Which experiment, where, and how much of it."""

    experiment: ExperimentFile
    store: str = "features.zarr"
    """URL of the store."""
    out: Path = Path("experiment")
    """Folder of the results."""
    trained: Path | None = None
    """Folder of the scores of single settings, which experiments can share; None: ``out``/`TRAINED`."""
    only: tuple[str, ...] = ()
    """Only these settings; empty: all."""
    splits: int | None = None
    """Splits of every head; None: as the experiment says. So with the next."""
    ensemble: int | None = None
    max_steps: int | None = None
    """Steps at most of every head, where it has not fewer."""
    limit: int | None = None
    """Only the first so many images are extracted, and heads leave the others out."""
    workers: int = 1
    """Processes that train settings side by side."""
    device: str | None = None
    data_root: Path | None = None
    seed: int = 0
    """Of noise, splits and initial weights, where the experiment does not say."""

    def __post_init__(self) -> None:
        """Refuse an unknown setting."""
        known = [one.name for one in self.experiment.settings]
        for name in self.only:
            if name not in known:
                raise unknown_name("setting", name, known)

    @property
    def chosen(self) -> tuple[Setting, ...]:
        """The settings that are wanted."""
        return tuple(one for one in self.experiment.settings if not self.only or one.name in self.only)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a setting scored."""

    metrics: Mapping[str, Metric]
    seconds: float
    """That training and scoring took."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSetting:
    """A setting, the runs that it reads, and its scores if it was trained before."""

    setting: Setting
    training: TrainHeadConfig
    runs: tuple[str, ...]
    """Fingerprints."""
    images: int
    """That are extracted for it."""
    file: Path
    """Where its scores belong."""
    key: str
    """Digest of all that decides them."""
    known: Scores | None
    """None: it is still to be trained."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScoredRuns:
    """What content-shift scores of a setting are made of, as buckets of one run each."""

    setting: str
    over: str
    """Name of the setting that gains are over."""
    run: BucketConfig
    reference: BucketConfig
    anchor: BucketConfig
    origin: BucketConfig
    """The setting's own technique at the reference's timestep."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentPlan:
    """Everything that an experiment would do."""

    config: ExperimentConfig
    extractions: tuple[Plan, ...]
    """No run is in two of them."""
    settings: tuple[PlannedSetting, ...]
    scored: tuple[ScoredRuns, ...]
    passes_asked: int
    """Forward passes if every setting extracted for itself."""
    passes_made: int
    """Forward passes with every run extracted once, whether or not that has been done already."""
    runs: Mapping[str, int]
    """Images of every run, by fingerprint and data set."""

    @property
    def passes_todo(self) -> int:
        """Forward passes that the store does not have yet."""
        return sum(plan.passes_todo for plan in self.extractions)

    @property
    def bytes_todo(self) -> int:
        """Bytes that they add to the store."""
        return sum(plan.bytes_todo for plan in self.extractions)

    @property
    def seconds(self) -> float | None:
        """Estimate for the passes; None: never measured on this machine."""
        times = [plan.seconds for plan in self.extractions]
        return None if None in times else sum(time for time in times if time is not None)

    @property
    def trainings_todo(self) -> int:
        """Heads that are still to be trained, one a split."""
        return sum(one.training.splits for one in {one.key: one for one in self.settings if one.known is None}.values())

    @property
    def training_seconds(self) -> float | None:
        """Estimate for them, from those of this experiment that have been trained; None: none has."""
        if not self.trainings_todo:
            return 0.0
        done = [(one.known.seconds, one.training.splits) for one in self.settings if one.known is not None]
        if not done:
            return None
        return self.trainings_todo * sum(seconds for seconds, _ in done) / sum(splits for _, splits in done)

    def to_json(self) -> dict[str, Any]:
        """The plan for ``--dry-run --json``."""
        return {
            "experiment": self.config.experiment.name,
            "title": self.config.experiment.title,
            "settings": [
                {"name": one.setting.name, "axes": dict(one.setting.axes), "trained": one.known is not None}
                for one in self.settings
            ],
            "extract": [plan.to_json() for plan in self.extractions],
            "passes_asked": self.passes_asked,
            "passes_made": self.passes_made,
            "passes_todo": self.passes_todo,
            "bytes": self.bytes_todo,
            "seconds": self.seconds,
            "trainings": self.trainings_todo,
            "training_seconds": self.training_seconds,
        }

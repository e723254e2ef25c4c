"""What train-head and evaluate ask of a task: labels, training on one split, scores."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from featstore.errors import BadRequestError, NotCommittedError
from featstore.heads.splits import Split
from featstore.pipelines.progress import Progress
from featstore.pipelines.reading import BucketConfig, OpenBucket

if TYPE_CHECKING:
    from featstore.heads.base import Head
    from featstore.heads.features import Features
    from featstore.pipelines.baseline import BaselineConfig
    from featstore.pipelines.cluster.connect import Cluster


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """How a head is built and trained, as far as that is the user's choice."""

    head: str
    """Which of the task's heads."""
    assigners: int = 3
    """Weight assigners, where there are several runs."""
    per_channel: bool = False
    """Whether an assigner weighs each channel apart, and not each run as a whole."""
    ensemble: int = 10
    """Members of an ensemble, where the head is one."""
    max_steps: int | None = None
    """Steps at most; None: the head's own number, or until the loss stops improving."""
    device: str = "cpu"
    seed: int = 0
    """Of initial weights and batches."""
    pixels_per_image: int | None = None
    """Labelled pixels of each training image that a pixel head gets; None: all of them."""
    cluster: Cluster | None = None
    """Whose workers gather those; None: this process does."""


class Result(Protocol):
    """What training on one split gives; a task's own result has more."""

    @property
    def head(self) -> Head:
        """The trained head."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Plain JSON; holds the task's `TaskKind.metrics` as numbers in 0..1."""


class PreparedTask(abc.ABC):
    """Labels of a data set, checked, with the features of a bucket: ready to be trained on."""

    bucket: OpenBucket
    usable: np.ndarray
    """(N,) bool over the store's rows: images with labels and features."""

    def features(self) -> Features:
        """The lazy features of the usable rows."""
        return self.bucket.features(self.usable)

    @abc.abstractmethod
    def train(self, split: Split, settings: HeadSettings, progress: Progress, title: str) -> Result:
        """Train a head on the split's training rows and score it on its test rows."""

    @abc.abstractmethod
    def score(self, head: Head, rows: np.ndarray, progress: Progress) -> dict[str, Any]:
        """What ``head`` scores on ``rows``, as `Result.metrics` has it.

        Raises:
            IncompatibleError: if the head is for another task or other classes.
        """

    def baseline(
        self, split: Split, config: BaselineConfig, settings: HeadSettings, progress: Progress, title: str
    ) -> dict[str, Any]:
        """What a network that is trained on the split's images themselves scores, for a task with `TaskKind.baselines`.

        Returns:
            Plain JSON; holds what `TaskKind.metrics` names.

        Raises:
            BadRequestError: for a task without baselines.
        """
        raise BadRequestError(f"this task has no baseline {config.name!r}")


Prepare = Callable[[OpenBucket, "LabelledRows", Progress], PreparedTask]
Predict = Callable[["Head", OpenBucket, np.ndarray, Path, Progress], dict[str, Any]]
"""Head, features, rows (n,) with features, folder for files: what is said, as plain JSON."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskKind:
    """A task that heads are trained for."""

    title: str
    """A few words for people."""
    heads: tuple[str, ...]
    """Names of its heads; the first is the default."""
    metrics: tuple[str, ...]
    """Numbers in 0..1 that are summed up over splits; the first is the one to compare by."""
    prepare: Prepare
    """Reads and checks labels."""
    baselines: tuple[str, ...] = ()
    """Names of the networks that its heads can be compared with."""
    predict: Predict | None = None
    """Writes what a head says of images of which nothing is known; None: it says nothing of single images."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LabelledRows:
    """Finds out which labelled images have features, and refuses or notes those without."""

    config: BucketConfig
    skip_missing: bool = False
    """Leave out images without features instead of refusing."""
    split: str | None = None
    """Only this split's images are needed; None: all."""

    def usable(self, bucket: OpenBucket, labelled: Collection[str], progress: Progress) -> np.ndarray:
        """Mask (N,) over the store's rows: True where an image is ``labelled`` and has features.

        Raises:
            NotCommittedError: if features of labelled images are missing and may not be left out.
        """
        split_of = {sample.key: sample.split for sample in bucket.dataset.samples}
        labelled = [key for key in labelled if self.split in (None, split_of[key])]
        missing = bucket.missing(labelled)
        if missing:
            text = (
                f"features of {len(missing)} of {len(labelled)} labelled images are missing or stale, "
                f"e.g. of {missing[0]!r}"
            )
            if not self.skip_missing:
                hint = f"run: {bucket.extract_command(self.config)} (or leave them out with --skip-missing)"
                raise NotCommittedError(text, hint=hint)
            progress.note(f"left out: {text}")
        there = set(labelled) - set(missing)
        return np.array([key in there for key in bucket.stored.samples.keys], dtype=bool)


class StepProgress:
    """Turns (steps done, steps at most) into a bar."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title, self._done = progress, title, 0

    def __call__(self, steps: int, most: int) -> None:
        """Advance to ``steps``."""
        if self._done == 0:
            self._progress.start(self._title, most, "steps")
        self._progress.advance(steps - self._done)
        self._done = steps

    def __enter__(self) -> StepProgress:
        """Begin; the bar appears with the first steps."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away, whatever happened."""
        self._progress.stop()

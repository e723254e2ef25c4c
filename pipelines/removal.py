"""`rm`: which runs are meant, what goes with them, and their removal."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

import featstore.store
import featstore.techniques
from featstore.errors import BadRequestError, NotFoundError, unknown_name
from featstore.pipelines.progress import Progress, Silent
from featstore.store import Store
from featstore.store.committed import as_records
from featstore.store.compare import held
from featstore.store.meaning import Query
from featstore.store.parallel import each
from featstore.store.removal import Doomed, keys_of, remove_dataset, remove_runs, require_idle, runs_of

_FINGERPRINT = re.compile(r"[0-9a-f]{6,64}")
"""So many digits that no technique is taken for a fingerprint."""
_SHOWN_PATHS = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RemovalConfig:
    """What to remove."""

    store: str
    """URL of the store."""
    runs: tuple[str, ...] = ()
    """Paths, first digits of fingerprints, or technique expressions."""
    dataset: str | None = None
    """Only this data set's runs; None: all."""
    query: Query = dataclasses.field(default_factory=Query)
    """Only these runs."""
    everything: bool = False
    """The whole data set ``dataset``."""

    def __post_init__(self) -> None:
        """Refuse what is too little or too much."""
        if self.everything and self.dataset is None:
            raise BadRequestError("--all removes a whole data set, but none is named", hint="name it with --dataset")
        if self.everything and (self.runs or self.query):
            raise BadRequestError("--all removes every run, yet some are picked out", hint="leave out one of the two")
        if not (self.everything or self.runs or self.query):
            raise BadRequestError(
                "no run is named", hint="`featstore info --long` prints their paths; --dataset D --all removes them all"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DoomedRun:
    """A run that is to go, and its size."""

    doomed: Doomed
    images: int
    """Images of which at least one layer is there."""
    objects: int
    """Files, or what a bucket has instead."""
    bytes: int
    """Of all objects."""

    @property
    def path(self) -> str:
        """Below the store."""
        return self.doomed.path

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; what a damaged run does not say is null."""
        run = self.doomed.run
        return {
            "path": self.path,
            "model": None if run is None else run.recipe.model,
            "technique": None if run is None else run.recipe.technique,
            "timestep": None if run is None else run.recipe.timestep,
            "fingerprint": None if run is None else run.fingerprint,
            "images": self.images,
            "bytes": self.bytes,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RemovalPlan:
    """What is to go."""

    runs: tuple[DoomedRun, ...]
    dataset: str | None
    """The data set that goes as a whole; None: only the runs."""

    @property
    def bytes(self) -> int:
        """Of all runs."""
        return sum(run.bytes for run in self.runs)

    @property
    def what(self) -> str:
        """For people."""
        runs = f"{len(self.runs)} run{'' if len(self.runs) == 1 else 's'}"
        return runs if self.dataset is None else f"data set {self.dataset!r} with {runs}"

    @property
    def paths(self) -> str:
        """The first few, for a message."""
        more = len(self.runs) - _SHOWN_PATHS
        return ", ".join(run.path for run in self.runs[:_SHOWN_PATHS]) + (f" and {more} more" if more > 0 else "")


def make_plan(config: RemovalConfig) -> RemovalPlan:
    """Find out what is to go; nothing is removed.

    Raises:
        NotFoundError: if there is no such store or data set.
        BadRequestError: for a name that no run has, or one that several data sets have.
        BusyError: if one of the runs is being written.
    """
    store = featstore.store.open(config.store)
    if store.objects.read_only:
        raise BadRequestError(f"nothing can be removed at {config.store!r}", hint="that place is for reading")
    names = store.datasets() if config.dataset is None else [config.dataset]
    if config.dataset is not None and not store.objects.names(config.dataset):
        store.dataset(config.dataset)  # says which there are
    there = [doomed for name in names for doomed in runs_of(store, name)]
    chosen = there if config.everything else _choose(config, there)
    require_idle(store.objects, [one.path for one in chosen])
    return RemovalPlan(
        runs=tuple(_sized(store, one) for one in chosen), dataset=config.dataset if config.everything else None
    )


def _choose(config: RemovalConfig, there: list[Doomed]) -> list[Doomed]:
    """The runs that are meant, in the order of their paths."""
    if config.query:
        fitting = {run.path for run in config.query.select([one.run for one in there if one.run is not None])}
        there = [one for one in there if one.path in fitting]
    if not config.runs:
        if not there:
            raise NotFoundError("no run has all of that")
        return there
    chosen = {one.path for word in config.runs for one in _meant(word, there)}
    return [one for one in there if one.path in chosen]


def _meant(word: str, there: list[Doomed]) -> list[Doomed]:
    """The runs that one word means."""
    by_path = [one for one in there if one.path == word.strip("/")]
    if by_path:
        return by_path
    runs = [one for one in there if one.run is not None]
    if _FINGERPRINT.fullmatch(word):
        found = [one for one in runs if one.run is not None and one.run.fingerprint.startswith(word)]
        if found:
            return found
    known = {one.run.recipe.technique for one in runs if one.run is not None}
    try:
        expressions = [technique.expression for technique in featstore.techniques.parse(word)]
    except BadRequestError:
        expressions = [word]
    found = []
    for expression in expressions:
        if expression not in known:
            paths = {one.path for one in there}
            raise unknown_name("run", expression, paths if expression.count("/") > 2 else known)
        found += [one for one in runs if one.run is not None and one.run.recipe.technique == expression]
    datasets = sorted({one.path.partition("/")[0] for one in found})
    if len(datasets) > 1:
        raise BadRequestError(
            f"{word!r} means runs of several data sets: {', '.join(datasets)}", hint="name one with --dataset"
        )
    return found


def _sized(store: Store, doomed: Doomed) -> DoomedRun:
    images = 0
    if doomed.run is not None:
        run, rows = doomed.run, np.arange(doomed.run.n_images)
        wanted = as_records(run.dataset.samples.digest_bytes(0, run.n_images))
        images = int(np.logical_or.reduce([held(run, layer, rows, wanted)[0] for layer in run.layers]).sum())
    keys = keys_of(store.objects, doomed.path)
    return DoomedRun(
        doomed=doomed,
        images=images,
        objects=len(keys),
        bytes=sum(each(store.objects, store.objects.size_bytes, keys)),
    )


def execute(config: RemovalConfig, plan: RemovalPlan, progress: Progress | None = None) -> None:
    """Remove what a plan of `make_plan` says.

    Raises:
        BusyError: if one of the runs is being written by now.
        StorageError: if the store cannot be written.
    """
    progress = progress or Silent()
    store = featstore.store.create(config.store)
    progress.start("removing", sum(run.objects for run in plan.runs), "objects")
    try:
        if plan.dataset is not None:
            remove_dataset(store, plan.dataset, progress.advance)
        else:
            remove_runs(store, [run.doomed for run in plan.runs], progress.advance)
    finally:
        progress.stop()

"""What runs in worker processes: one job and one model at a time, blocks through the code that a single process runs.

A worker has two threads. While one has the device, the other reads the images of the next block or writes the maps of
the last: `_Turn` is what they take turns by.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

import featstore.store
from featstore.pipelines.batch import probed_batch_size_of
from featstore.pipelines.claims import Claims, Work
from featstore.pipelines.cluster.images import ImageSource
from featstore.pipelines.cluster.job import Block, Images, Job, Parcel
from featstore.pipelines.cluster.seen import Problem, Seen, look_around
from featstore.pipelines.compute import Group, extractor_of, walk
from featstore.pipelines.flight import Flight
from featstore.pipelines.images import ImageReader
from featstore.pipelines.memory import peak_rss_bytes
from featstore.pipelines.outcome import RunOutcome
from featstore.pipelines.plan import Plan, PlannedRun
from featstore.pipelines.progress import Silent
from featstore.pipelines.rates import Rates
from featstore.pipelines.reduction import fit, projections
from featstore.pipelines.writing import BlockWriter
from featstore.store import Run
from featstore.store.basis import Basis
from featstore.store.leases import Keeper

if TYPE_CHECKING:
    from featstore.extraction.forward import Extractor
    from featstore.extraction.reduce import Projection
    from featstore.models.backbones.base import Backbone


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What became of one run's share of a block."""

    run: int
    """Index in the job."""
    computed: int = 0
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Keys of images that could not be extracted, each with the reason."""
    busy: str = ""
    """Who else holds the block; empty: it was ours."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """What became of a block."""

    runs: tuple[RunResult, ...] = ()
    seconds: float = 0.0
    """For which it had the device."""
    peak_rss_bytes: int = 0
    """Of the worker's process so far."""
    peak_device_bytes: int | None = None
    """Largest memory taken on the worker's GPU so far; None: it has none."""
    refused: Problem | None = None
    """Why this worker can compute none of the job's blocks."""


_guard = threading.Lock()
"""Held while the job of the process changes."""
_device = threading.Lock()
"""Held by the thread that uses the model."""
_job: _JobHere | None = None
_model: tuple[tuple[str, str, str], Backbone] | None = None


def extract_block(parcel: Parcel, block: Block) -> BlockResult:
    """Compute and commit what is missing of a block.

    Raises:
        StorageError: if it cannot be written.
    """
    here = _job_here(parcel)
    if here.problem is not None:
        return BlockResult(refused=here.problem)
    return here.extract(block)


def look(parcel: Parcel) -> Problem | str:
    """Why this worker cannot do the job, or the key of what it has put into the store."""
    here = _job_here(parcel)
    return here.problem or here.answer


def probe(parcel: Parcel) -> int:
    """Rows of every forward pass of the job's runs: what fits this worker's GPU."""
    here = _job_here(parcel)
    with _device:
        model = here.model()
        return probed_batch_size_of([here.planned(index, {}) for index in range(len(here.job.runs))], model)


def fit_run(
    parcel: Parcel, index: int, whole: Mapping[str, Any], sample: Images, batch_size: int, threads: int | None
) -> dict[str, Basis]:
    """What reduces the new layers of one of the job's runs.

    Args:
        parcel: the job.
        index: of the run.
        whole: the model's own shapes of layers that are reduced.
        sample: the images that it is fitted on.
        batch_size: rows of every forward pass of the run.
        threads: of torch; None: on a GPU.
    """
    import torch

    here = _job_here(parcel)
    with _device:
        if threads is not None:
            torch.set_num_threads(threads)
        planned = dataclasses.replace(here.planned(index, {}), to_fit=dict(whole), fit_images=len(sample))
        return fit(here.images.of(sample), planned, here.model(), batch_size, Silent())


def forget(job_id: str) -> None:
    """Let go of a job and of its model."""
    global _job
    with _guard:
        if _job is not None and _job.job.id == job_id:
            _job = None
    with _device:
        _close()


def _job_here(parcel: Parcel) -> _JobHere:
    """The job, looked at once a process."""
    global _job
    with _guard:
        if _job is None or _job.job.id != parcel.id:
            _job = _JobHere(parcel.job(), _job)
        return _job


def _close() -> None:
    global _model
    if _model is not None:
        _model[1].close()
    _model = None


class _JobHere:
    """A job on this worker: what was found out once and is used for all its blocks.

    Args:
        job: which.
        before: the process's last job; if it is an earlier stage of the same extraction, nothing is looked for again.
    """

    def __init__(self, job: Job, before: _JobHere | None) -> None:
        self.job = job
        self.images: ImageSource
        self._seen: Seen | Problem
        if before is not None and before.job.mark == job.mark:
            self.images, self._seen = before.images, before._seen
        else:
            self.images = ImageSource(job)
            self._seen = look_around(job, self.images)
        self.problem = self._seen if isinstance(self._seen, Problem) else None
        if not isinstance(self._seen, Problem):
            self.answer = self._seen.answer
            self._source, self._steerings = self._seen.source, self._seen.steerings
            self._device_name = self._seen.device
        self._runs: dict[int, Run] = {}
        self._made_for: Backbone | None = None
        self._extractors: dict[int, Extractor] = {}
        self._projections: dict[int, Mapping[str, Projection]] = {}
        self._stored: featstore.store.StoredDataset | None = None

    # what the thread that has the device may ask for

    def model(self) -> Backbone:
        """The job's model, loaded if the process has another one or none."""
        global _model
        key = (self.job.weights_digest, self._device_name, self.job.compute_dtype)
        if _model is None or _model[0] != key:
            _close()
            _model = (key, self._source.load(self._device_name, self.job.compute_dtype))
        if self._made_for is not _model[1]:
            self._made_for, self._extractors, self._projections = _model[1], {}, {}
        return _model[1]

    def extractor(self, group: int) -> Extractor:
        """What runs the passes of a group."""
        model = self.model()
        if group not in self._extractors:
            one = self.job.groups[group]
            planned = [self.planned(index, {}) for index in one.runs]
            self._extractors[group] = extractor_of(model, planned, one.batch_size)
        return self._extractors[group]

    def projections(self, index: int) -> Mapping[str, Projection]:
        """What reduces layers of a run."""
        model = self.model()
        if index not in self._projections:
            self._projections[index] = projections(self._run(index), list(self.job.runs[index].layers), model.device)
        return self._projections[index]

    # blocks

    def planned(self, index: int, missing: Mapping[str, np.ndarray]) -> PlannedRun:
        """One of the job's runs, for a few images."""
        run = self.job.runs[index]
        return PlannedRun(
            recipe=run.recipe,
            steering=self._steerings[index],
            layers=dict(run.layers),
            run=None,
            missing=dict(missing),
        )

    def extract(self, block: Block) -> BlockResult:
        """Compute and commit what is missing of a block."""
        group = self.job.groups[block.group]
        nothing = np.zeros(len(block.rows), dtype=bool)
        outcomes = []
        for index in group.runs:
            missing = block.missing.get(index) or dict.fromkeys(self.job.runs[index].layers, nothing)
            own = {layer: mask.copy() for layer, mask in missing.items()}
            outcomes.append(RunOutcome(self.planned(index, missing), self._run(index), block.rows, own))
        plan = Plan(
            config=self.job.config,
            dataset=self.images.of(block.images),
            dataset_name=self.job.dataset_name,
            source=self._source,
            device=self._device_name,
            wanted=tuple(range(len(block.rows))),
            runs=tuple(outcome.planned for outcome in outcomes),
            seconds=None,
        )
        asked = [outcome for index, outcome in zip(group.runs, outcomes, strict=True) if index in block.missing]
        progress = Silent()
        turn = _Turn(self, block.group, outcomes, group.threads)
        with Keeper() as keeper, ImageReader(plan) as reader, BlockWriter() as writer:
            claims = Claims(keeper, self.job.id)
            turn.group.work = [Work(block.block, tuple(asked))]
            flight = Flight(plan, claims, writer, Rates({}), progress)
            walk(plan, turn.group, claims, reader, flight, progress, turn)
        busy = {id(outcome) for work in claims.again() for outcome in work.outcomes}
        holders = ", ".join(sorted(claims.holders))
        return BlockResult(
            runs=tuple(
                RunResult(
                    run=index,
                    computed=outcome.computed,
                    failed=outcome.failed,
                    busy=holders if id(outcome) in busy else "",
                )
                for index, outcome in zip(group.runs, outcomes, strict=True)
                if index in block.missing
            ),
            seconds=turn.seconds,
            peak_rss_bytes=peak_rss_bytes(),
            peak_device_bytes=_peak_device_bytes(self._device_name),
        )

    def _run(self, index: int) -> Run:
        with _guard:
            if self._stored is None:
                self._stored = featstore.store.create(self.job.config.store).dataset(self.job.dataset_name)
            if index not in self._runs:
                path = self.job.runs[index].path
                assert path is not None
                self._runs[index] = self._stored.open_run(path)
            return self._runs[index]


class _Turn:
    """The device, as long as a thread has it; with what the thread needs there, which another may have thrown out."""

    def __init__(self, here: _JobHere, number: int, outcomes: Sequence[RunOutcome], threads: int | None) -> None:
        self._here = here
        self._number = number
        self.group = Group(list(outcomes), None, threads, [])  # type: ignore[arg-type] # it comes with the device
        self.seconds = 0.0
        self._since = 0.0

    def __enter__(self) -> None:
        _device.acquire()
        try:
            self.group.extractor = self._here.extractor(self._number)
            indices = self._here.job.groups[self._number].runs
            for index, outcome in zip(indices, self.group.outcomes, strict=True):
                outcome.projections = self._here.projections(index)
        except BaseException:
            _device.release()
            raise
        self._since = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.perf_counter() - self._since
        _device.release()


def _peak_device_bytes(device: str) -> int | None:
    if device == "cpu":
        return None
    import torch

    return torch.cuda.max_memory_allocated(device)


__all__ = ["BlockResult", "Problem", "RunResult", "extract_block", "fit_run", "forget", "look", "probe"]

"""Blocks out to workers, results back in: what the client does while a cluster computes."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

import featstore.errors
from featstore.errors import FeatstoreError, StorageError
from featstore.pipelines.cluster.config import ClusterConfig
from featstore.pipelines.cluster.interrupt import stopping
from featstore.pipelines.cluster.job import Block, Job, Parcel, block_of, blocks_of
from featstore.pipelines.cluster.preflight import problem_line
from featstore.pipelines.cluster.window import Task, run_tasks
from featstore.pipelines.cluster.worker import BlockResult, extract_block
from featstore.pipelines.engine import WorkerReport
from featstore.pipelines.outcome import RunOutcome
from featstore.pipelines.plan import Plan
from featstore.pipelines.progress import Progress
from featstore.pipelines.rates import Rates

if TYPE_CHECKING:
    from distributed import Client

_OWN_ERRORS = {
    name for name, one in vars(featstore.errors).items() if isinstance(one, type) and issubclass(one, FeatstoreError)
}
_POLL_SECONDS = (0.2, 5.0)
"""Time between two looks at blocks that others hold: at first, and at most."""
_LEAST_BLOCK_SECONDS = 1800.0
_UNKNOWN_BLOCK_SECONDS = 6 * 3600.0
_PATIENCE = 20
"""How many times the estimate a block may take before its worker counts as hung."""
_TITLE_SECONDS = 2.0
_HOPELESS = 3
"""Blocks that are given up one after the other, for errors of the store, after which nothing more is tried."""


@dataclasses.dataclass
class _Worker:
    """What one worker has done so far."""

    first: float
    last: float
    passes: int = 0
    peak_rss_bytes: int = 0
    peak_device_bytes: int | None = None


class Delivery:
    """Sends the blocks of a job and notes what becomes of them.

    Args:
        plan: what they are part of.
        client: of the workers.
        config: how often, and for how long.
        progress: told of every block.
        event: takes a kind of event and facts, for a log.
    """

    def __init__(
        self,
        plan: Plan,
        client: Client,
        config: ClusterConfig,
        progress: Progress,
        event: Callable[..., None],
    ) -> None:
        self._plan = plan
        self._client = client
        self._config = config
        self._progress = progress
        self._event = event
        self._workers: dict[str, _Worker] = {}
        self._refused: set[str] = set()
        self._again: list[tuple[int, int]] = []
        self._holders: set[str] = set()
        self._titled = 0.0
        self._hopeless = 0
        self.retries = 0
        """Blocks that were tried again."""

    def run(self, job: Job, outcomes: Sequence[RunOutcome]) -> None:
        """Have all blocks computed that runs lack something of.

        Args:
            job: made of them.
            outcomes: its runs; what becomes of them is noted in them.

        Raises:
            StorageError: if no worker can write, or the scheduler is lost; what was committed stays.
            KeyboardInterrupt: after SIGINT or SIGTERM, when what was under way is committed.
        """
        left = sum(int(outcome.todo.sum()) for outcome in outcomes)
        self._progress.start("extracting", left, "passes")
        try:
            with stopping(self._progress.note) as stop:
                waits, blocks = 0, blocks_of(self._plan, outcomes, job)
                while not stop.is_set():
                    self._send(job, outcomes, blocks, stop)
                    if not self._again:
                        break
                    self._wait(waits, stop)
                    waits += 1
                    blocks = self._once_more(job, outcomes)
        finally:
            self._progress.stop()

    def reports(self) -> list[WorkerReport]:
        """What each worker did, by its address."""
        return [
            WorkerReport(
                name=name,
                passes=one.passes,
                seconds=one.last - one.first,
                peak_rss_bytes=one.peak_rss_bytes,
                peak_device_bytes=one.peak_device_bytes,
            )
            for name, one in sorted(self._workers.items())
        ]

    def _send(self, job: Job, outcomes: Sequence[RunOutcome], blocks: Iterator[Block], stop: threading.Event) -> None:
        parcel = Parcel.of(job)
        tasks = (Task(key=f"extract-block-{block.group}-{block.block}-{job.id}", value=block) for block in blocks)

        def done(task: Task, result: BlockResult, worker: str) -> None:
            self._done(job, outcomes, task.value, result, worker)

        def failed(task: Task, reason: str) -> None:
            self._failed(outcomes, task.value, reason)

        self.retries += run_tasks(
            self._client,
            functools.partial(extract_block, parcel),
            tasks,
            done=done,
            failed=failed,
            note=self._progress.note,
            tries=self._config.tries,
            timeout_seconds=self._block_seconds(outcomes),
            stop=stop,
            barred=self._refused,
        ).retried

    def _done(self, job: Job, outcomes: Sequence[RunOutcome], block: Block, result: BlockResult, worker: str) -> None:
        if result.refused is not None:
            if worker not in self._refused:
                self._refused.add(worker)
                self._progress.note(problem_line(worker, result.refused))
            self._require_somebody(result)
            self._again.append((block.group, block.block))
            return
        self._hopeless = 0
        passes = failed = 0
        for one in result.runs:
            if one.busy:
                self._holders.add(one.busy)
                if (block.group, block.block) not in self._again[-1:]:
                    self._again.append((block.group, block.block))
                continue
            outcome, positions = outcomes[one.run], self._positions(outcomes[one.run], block, one.run)
            outcome.computed += one.computed
            outcome.failed.update(one.failed)
            outcome.done(positions)
            passes += one.computed
            failed += len(one.failed)
            self._progress.advance(len(positions))
        self._note_worker(worker, passes, result)
        runs = [job.runs[one.run].path for one in result.runs]
        facts = {"runs": runs, "computed": passes, "failed": failed, "seconds": round(result.seconds, 3)}
        self._event("block", worker=worker, block=block.block, **facts)

    def _failed(self, outcomes: Sequence[RunOutcome], block: Block, reason: str) -> None:
        self._event("given up", block=block.block, reason=reason)
        # A worker that has lost its mount, or whose disk is full, costs tries elsewhere; a store that nobody can write
        # must not cost every image of the data set.
        self._hopeless = self._hopeless + 1 if reason.partition(":")[0] in _OWN_ERRORS else 0
        if self._hopeless >= _HOPELESS:
            raise StorageError(
                f"{_HOPELESS} blocks one after the other failed {self._config.tries} times each, at last: {reason}",
                hint="what was committed stays: run the same command again when workers can read and write the store",
            )
        for index in block.missing:
            outcome, positions = outcomes[index], self._positions(outcomes[index], block, index)
            samples = self._plan.dataset.samples
            for position in positions.tolist():
                key = samples[self._plan.wanted[position]].key
                outcome.failed[key] = (
                    f"its block of {len(positions)} images failed {self._config.tries} times: {reason}"
                )
            outcome.done(positions)
            self._progress.advance(len(positions))

    def _positions(self, outcome: RunOutcome, block: Block, run: int) -> np.ndarray:
        """Positions in ``plan.wanted`` (n,) of the images that a block's task was for."""
        asked = block.rows[np.logical_or.reduce(list(block.missing[run].values()))]
        positions = outcome.positions(block.block)
        return positions[np.isin(outcome.rows[positions], asked)]

    def _require_somebody(self, result: BlockResult) -> None:
        """Give up if no worker that is there can do the job."""
        there = set(self._client.scheduler_info(n_workers=-1)["workers"])
        if there and there <= self._refused and result.refused is not None:
            raise StorageError(
                f"none of the {len(there)} workers can do this job any more: {result.refused.message}",
                hint=result.refused.hint,
            )

    def _note_worker(self, worker: str, passes: int, result: BlockResult) -> None:
        now = time.monotonic()
        if worker not in self._workers:
            self._event("worker came", worker=worker)
        one = self._workers.setdefault(worker, _Worker(now - result.seconds, now))
        one.last = now
        one.passes += passes
        one.peak_rss_bytes = max(one.peak_rss_bytes, result.peak_rss_bytes)
        if result.peak_device_bytes is not None:
            one.peak_device_bytes = max(one.peak_device_bytes or 0, result.peak_device_bytes)
        if now - self._titled > _TITLE_SECONDS:
            self._titled = now
            self._progress.describe(self._title())

    def _title(self) -> str:
        rates = [one.passes / (one.last - one.first) for one in self._workers.values() if one.last > one.first]
        if not rates:
            return "extracting"
        if len(rates) == 1:
            return f"extracting on 1 worker, {rates[0]:.1f} passes/s"
        return f"extracting on {len(rates)} workers, each {min(rates):.1f}..{max(rates):.1f} passes/s"

    def _block_seconds(self, outcomes: Sequence[RunOutcome]) -> float:
        """How long a block may take."""
        if self._config.block_seconds is not None:
            return self._config.block_seconds
        largest = [
            (Rates.key(one.planned.recipe, self._plan.device), one.run.block_length)
            for one in outcomes
            if one.todo.any()
        ]
        estimate = Rates.load().estimate_seconds(largest)
        return _UNKNOWN_BLOCK_SECONDS if estimate is None else max(_LEAST_BLOCK_SECONDS, _PATIENCE * estimate)

    def _wait(self, waits: int, stop: threading.Event) -> None:
        if not waits and self._holders:
            holders = ", ".join(sorted(self._holders))
            self._progress.note(f"waiting for {len(self._again)} blocks that are being computed by {holders}")
        first, most = _POLL_SECONDS
        stop.wait(min(first * 1.5**waits, most))

    def _once_more(self, job: Job, outcomes: Sequence[RunOutcome]) -> Iterator[Block]:
        again, self._again = self._again, []
        for group, number in again:
            block = block_of(self._plan, outcomes, job, group, number)
            if block is not None:
                yield block

"""The passes of an extraction on a cluster: what `featstore.pipelines.extract` runs in place of its own process."""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from featstore.pipelines.batch import cpu_batch_size
from featstore.pipelines.cluster.connect import Cluster
from featstore.pipelines.cluster.delivery import Delivery
from featstore.pipelines.cluster.job import Job, Parcel, images_of, make_job
from featstore.pipelines.cluster.preflight import check_workers, marked
from featstore.pipelines.cluster.worker import fit_run, forget, probe
from featstore.pipelines.engine import WorkerReport
from featstore.pipelines.outcome import RunOutcome
from featstore.pipelines.plan import Plan
from featstore.pipelines.progress import Progress
from featstore.pipelines.provenance import cpu_name
from featstore.pipelines.reduction import sample_of
from featstore.store.basis import Basis
from featstore.store.objects import INTERNAL, Objects

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")


class There:
    """Runs a plan's passes on the workers of a cluster; an `Engine`.

    Args:
        plan: what to do.
        objects: of the store.
        cluster: its workers are started if they are not there yet.
        progress: told of what the user should see.
        event: takes a kind of event and facts, for a log.

    Raises:
        FeatstoreError: on entering, if workers cannot do it; see `check_workers`.
    """

    def __init__(
        self, plan: Plan, objects: Objects, cluster: Cluster, progress: Progress, event: Callable[..., None]
    ) -> None:
        self._plan = plan
        self._objects = objects
        self._cluster = cluster
        self._progress = progress
        self._event = event
        self._stack = contextlib.ExitStack()
        self._delivery: Delivery | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._client: Client = self._cluster.client(self._plan.device)
            self._mark = f"{INTERNAL}/preflight/{secrets.token_hex(8)}"
            stack.enter_context(marked(self._objects, self._mark, secrets.token_bytes(16)))
            self._first = make_job(self._plan, [], self._mark)
            self._parcel = Parcel.of(self._first)
            check_workers(self._client, self._parcel, self._objects)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the passes of new runs run on; of workers on other machines, whose processors are not asked."""
        device = self._plan.device
        local = self._cluster.config.scheduler is None
        threads = self._threads()
        hardware = cpu_name() if local and device == "cpu" else f"workers of a cluster ({device})"
        return {"device": device, "hardware": hardware, "cpu_threads": threads}

    def batch_size(self) -> int:
        """Rows of every forward pass of new runs: what fits the GPU of a worker."""
        plan, recipe = self._plan, self._plan.runs[0].recipe
        if plan.device == "cpu":
            return cpu_batch_size(plan.source, recipe.height_px, recipe.width_px)
        return self._on_one("featstore-batch", functools.partial(probe, self._parcel))

    def fit(self, sizes: Sequence[int], progress: Progress) -> list[dict[str, Basis]]:
        """What reduces the new layers of each run, found by one worker."""
        plan = self._plan
        bases: list[dict[str, Basis]] = []
        for index, (planned, size) in enumerate(zip(plan.runs, sizes, strict=True)):
            if not planned.to_fit:
                bases.append({})
                continue
            sample = images_of(plan, sample_of(plan.dataset, planned.recipe), {index: None})
            call = functools.partial(fit_run, self._parcel, index, planned.to_fit, sample, size, self._threads())
            bases.append(self._on_one("featstore-fit", call))
            progress.advance(planned.fit_images)
        return bases

    def compute(self, outcomes: Sequence[RunOutcome], progress: Progress) -> None:
        """Run all passes that the runs lack."""
        job = make_job(self._plan, outcomes, self._mark)
        if self._delivery is None:
            self._delivery = Delivery(self._plan, self._client, self._cluster.config, progress, self._event)
        try:
            self._delivery.run(job, outcomes)
        finally:
            self._forget(job)

    @property
    def workers(self) -> Sequence[WorkerReport]:
        """What each worker did."""
        return () if self._delivery is None else self._delivery.reports()

    @property
    def retries(self) -> int:
        """Blocks that were tried again."""
        return 0 if self._delivery is None else self._delivery.retries

    @property
    def peak_device_bytes(self) -> int | None:
        """Largest memory taken on a worker's GPU; None: none was used."""
        return max((one.peak_device_bytes for one in self.workers if one.peak_device_bytes is not None), default=None)

    def _threads(self) -> int | None:
        return self._cluster.cpu_threads() if self._plan.device == "cpu" else None

    def _on_one(self, name: str, call: functools.partial[T]) -> T:
        """What one worker makes of a call."""
        result: T = self._client.submit(call, key=f"{name}-{secrets.token_hex(6)}", pure=False).result()
        return result

    def _forget(self, job: Job) -> None:
        """Let workers free their memory, if they are still there."""
        with contextlib.suppress(Exception):
            self._client.run(forget, job.id, on_error="ignore")

"""Extraction joined up: plan, forward passes, blocks to the store. The one module that knows all stages."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import featstore.store
from featstore.errors import StorageError
from featstore.pipelines.cluster.config import ClusterConfig
from featstore.pipelines.cluster.opening import open_cluster
from featstore.pipelines.engine import Engine, WorkerReport, new_runs
from featstore.pipelines.here import Here
from featstore.pipelines.memory import peak_rss_bytes
from featstore.pipelines.outcome import RunOutcome
from featstore.pipelines.plan import ExtractConfig, Plan, PlannedRun, make_plan, sample_table
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.provenance import provenance
from featstore.pipelines.run_log import ExtractionLog
from featstore.store import Store, StoredDataset
from featstore.store.basis import Basis

if TYPE_CHECKING:
    from featstore.models.backbones.base import Backbone
    from featstore.pipelines.cluster.connect import Cluster

_CREATING_THREADS = 8
_ROUNDS = 3
_PACKAGES = ("featstore", "torch", "diffusers", "transformers", "peft", "controlnet-aux", "pillow", "numpy")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExtractReport:
    """What an extraction did; `to_json` is what ``--json`` prints."""

    plan: Plan
    outcomes: tuple[RunOutcome, ...]
    seconds: float
    peak_device_bytes: int | None = None
    """Largest memory taken on a GPU; None: none was used."""
    workers: tuple[WorkerReport, ...] = ()
    """What each process of a cluster did; empty: this one did all."""

    @property
    def failed(self) -> dict[str, str]:
        """Keys of all images that failed in any run, with the reason."""
        return {key: reason for outcome in self.outcomes for key, reason in outcome.failed.items()}

    @property
    def passes(self) -> int:
        """Forward passes whose features were stored."""
        return sum(outcome.computed for outcome in self.outcomes)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON; bytes are those of the layers asked for, of the images that are there."""
        images = len(self.plan.wanted)
        runs = [
            {
                "technique": outcome.planned.recipe.technique,
                "timestep": outcome.planned.recipe.timestep,
                "fingerprint": outcome.planned.recipe.fingerprint,
                "images": images,
                "computed": outcome.computed,
                "reused": images - outcome.computed - len(outcome.failed),
                "failed": [{"key": key, "reason": reason} for key, reason in outcome.failed.items()],
                "layers": {name: list(shape) for name, shape in outcome.planned.layers.items()},
                **({"reduced": outcome.reduced} if outcome.planned.recipe.components else {}),
                "bytes": (images - len(outcome.failed)) * sum(outcome.planned.bytes_per_image.values()),
            }
            for outcome in self.outcomes
        ]
        device = {} if self.peak_device_bytes is None else {"peak_device_bytes": self.peak_device_bytes}
        return {
            "dataset": self.plan.dataset_name,
            "model": self.plan.source.name,
            "runs": runs,
            "seconds": self.seconds,
            "images_per_second": self.passes / self.seconds if self.seconds > 0 else 0.0,
            "peak_rss_bytes": peak_rss_bytes(),
            **device,
            **({"workers": [worker.to_json() for worker in self.workers]} if self.workers else {}),
        }


def extract(
    config: ExtractConfig, progress: Progress | None = None, *, cluster: ClusterConfig | None = None
) -> ExtractReport:
    """Plan and run an extraction; see `make_plan` for what is refused and `execute` for the rest.

    Args:
        config: what to extract.
        progress: told of every block.
        cluster: where; None: in this process.
    """
    told = progress or Silent()
    with open_cluster(cluster, told, store=config.store) as place:
        plan = make_plan(config, device=None if place is None else place.device(config.device))
        return execute(plan, told, cluster=place)


def execute(
    plan: Plan, progress: Progress, *, backbone: Backbone | None = None, cluster: Cluster | None = None
) -> ExtractReport:
    """Run what a plan leaves to do.

    An image that cannot be read, or whose features are not finite, is skipped in the runs that it
    spoils and named in the report; it is tried again by the next call.

    Host memory is bounded whatever the data set's size: two blocks of decoded images, the maps of two runs'
    shares of a block on their way, and `BlockWriter`'s queue.

    Args:
        plan: what to do.
        progress: told of every block.
        backbone: the plan's model if it is loaded already; it is then left open.
        cluster: the processes that compute; None: this one does.

    Raises:
        StorageError: if the store cannot be written, before any weight is loaded, or if writing fails
            on the way; what was committed stays.
    """
    start = time.perf_counter()
    store = featstore.store.create(plan.config.store)
    stored = store.put_samples(plan.dataset_name, sample_table(plan.dataset), source=plan.dataset.info.source)
    with ExtractionLog(plan, store.objects, progress) as log:
        with _engine(plan, store, log, backbone, cluster) as engine:
            outcomes = _open_runs(plan, stored, engine, log.progress)
            log.watch(outcomes, engine)
            if plan.passes_todo:
                _compute(plan, outcomes, engine, log.progress)
        store.finish([outcome.run for outcome in outcomes])
    return ExtractReport(
        plan=plan,
        outcomes=tuple(outcomes),
        seconds=time.perf_counter() - start,
        peak_device_bytes=engine.peak_device_bytes,
        workers=tuple(engine.workers),
    )


def _engine(plan: Plan, store: Store, log: ExtractionLog, backbone: Backbone | None, cluster: Cluster | None) -> Engine:
    if cluster is None or not plan.passes_todo:
        return Here(plan, backbone)
    from featstore.pipelines.cluster.there import There

    return There(plan, store.objects, cluster, log.progress, log.log.event)


def _open_runs(plan: Plan, stored: StoredDataset, engine: Engine, progress: Progress) -> list[RunOutcome]:
    made_by = provenance(_PACKAGES, **engine.provenance)
    rows = stored.rows([sample.key for sample in plan.dataset.samples])[list(plan.wanted)]
    new = (plan.config.batch_size or engine.batch_size()) if new_runs(plan) else 0

    sizes = [planned.run.batch_size if planned.run is not None else new for planned in plan.runs]
    bases = _fit(plan, sizes, engine, progress)

    def create(planned: PlannedRun, batch_size: int, fitted: Mapping[str, Basis]) -> RunOutcome:
        run = stored.create_run(
            planned.recipe,
            planned.layers,
            batch_size=batch_size,
            provenance=made_by,
            bases=fitted,
            compress=plan.config.compress,
        )
        if plan.config.overwrite and planned.run is not None:
            run.uncommit(rows, list(planned.layers))
        return RunOutcome(planned, run, rows, {name: mask.copy() for name, mask in planned.missing.items()})

    # Mostly waiting for the disk to sync, or for a remote store to answer.
    with ThreadPoolExecutor(_CREATING_THREADS) as pool:
        return list(pool.map(create, plan.runs, sizes, bases))


def _fit(plan: Plan, sizes: Sequence[int], engine: Engine, progress: Progress) -> list[dict[str, Basis]]:
    """What reduces the new layers of each run."""
    if not plan.passes_todo or not plan.fit_passes:
        return [{} for _ in plan.runs]
    progress.start("fitting what reduces channels", plan.fit_passes, "passes")
    try:
        return engine.fit(sizes, progress)
    finally:
        progress.stop()


def _compute(plan: Plan, outcomes: Sequence[RunOutcome], engine: Engine, progress: Progress) -> None:
    """Compute what is missing, and again what another writer of the same blocks has put itself in the place of.

    Where nothing locks a block for good (a bucket, a file system without locks), a process that was thought dead can
    still write one that was given to us; rows of ours may then be gone from its record. They are made once more.
    """
    for _ in range(_ROUNDS):
        engine.compute(outcomes, progress)
        if not sum([_lost(plan, outcome) for outcome in outcomes]):
            return
        progress.note("another process has written the same blocks; what it replaced is computed again")
    raise StorageError(
        f"blocks of {plan.config.store!r} are replaced by another process again and again",
        hint="let one extraction of the same runs finish, then run the same command again",
    )


def _lost(plan: Plan, outcome: RunOutcome) -> int:
    """How many rows that were computed are not in the store; they are to be computed again."""
    made = outcome.planned.todo & ~outcome.todo
    samples = plan.dataset.samples
    made[[place for place, index in enumerate(plan.wanted) if samples[index].key in outcome.failed]] = False
    lost = 0
    for layer, valid in outcome.run.valid_each(list(outcome.missing)).items():
        gone = made & ~valid[outcome.rows]
        outcome.missing[layer] |= gone
        lost = max(lost, int(gone.sum()))
    outcome.computed = max(0, outcome.computed - lost)
    return lost

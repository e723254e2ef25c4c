"""Extraction joined up: plan, forward passes, blocks to the store. The one module that knows all stages."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

import featstore.store
from featstore.errors import StorageError
from featstore.pipelines.batch import cpu_batch_size, probed_batch_size
from featstore.pipelines.compute import compute, extractor_of
from featstore.pipelines.memory import peak_rss_bytes
from featstore.pipelines.outcome import RunOutcome
from featstore.pipelines.plan import ExtractConfig, Plan, PlannedRun, make_plan, sample_table
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.provenance import cpu_name, provenance
from featstore.pipelines.reduction import fit
from featstore.store import StoredDataset
from featstore.store.basis import Basis

if TYPE_CHECKING:
    from featstore.models.backbones.base import Backbone

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
        }


def extract(config: ExtractConfig, progress: Progress | None = None) -> ExtractReport:
    """Plan and run an extraction; see `make_plan` for what is refused and `execute` for the rest."""
    return execute(make_plan(config), progress or Silent())


def execute(plan: Plan, progress: Progress, *, backbone: Backbone | None = None) -> ExtractReport:
    """Run what a plan leaves to do.

    An image that cannot be read, or whose features are not finite, is skipped in the runs that it
    spoils and named in the report; it is tried again by the next call.

    Host memory is bounded whatever the data set's size: two blocks of decoded images, the maps of two runs'
    shares of a block on their way, and `BlockWriter`'s queue.

    Args:
        plan: what to do.
        progress: told of every block.
        backbone: the plan's model if it is loaded already; it is then left open.

    Raises:
        StorageError: if the store cannot be written, before any weight is loaded, or if writing fails
            on the way; what was committed stays.
    """
    start = time.perf_counter()
    store = featstore.store.create(plan.config.store)
    stored = store.put_samples(plan.dataset_name, sample_table(plan.dataset), source=plan.dataset.info.source)
    with contextlib.ExitStack() as stack:
        model = backbone
        if plan.passes_todo and model is None:
            model = stack.enter_context(plan.source.load(plan.device, plan.runs[0].recipe.compute_dtype))
        outcomes = _open_runs(plan, stored, model, progress)
        if plan.passes_todo and model is not None:
            _compute(plan, outcomes, model, progress)
    store.finish([outcome.run for outcome in outcomes])
    return ExtractReport(
        plan=plan,
        outcomes=tuple(outcomes),
        seconds=time.perf_counter() - start,
        peak_device_bytes=_peak_device_bytes(plan),
    )


def _peak_device_bytes(plan: Plan) -> int | None:
    """Largest memory that this process took on the plan's GPU; None on a CPU, and where nothing was computed."""
    if plan.device == "cpu" or not plan.passes_todo:
        return None
    import torch

    return torch.cuda.max_memory_allocated(plan.device)


def _open_runs(plan: Plan, stored: StoredDataset, model: Backbone | None, progress: Progress) -> list[RunOutcome]:
    made_by = provenance(_PACKAGES, device=plan.device, hardware=_hardware(plan), cpu_threads=_cpu_threads(plan))
    rows = stored.rows([sample.key for sample in plan.dataset.samples])[list(plan.wanted)]
    new = _new_batch_size(plan, model) if any(planned.run is None for planned in plan.runs) else 0

    sizes = [planned.run.batch_size if planned.run is not None else new for planned in plan.runs]
    bases = _fit(plan, sizes, model, progress)

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


def _fit(plan: Plan, sizes: Sequence[int], model: Backbone | None, progress: Progress) -> list[dict[str, Basis]]:
    """What reduces the new layers of each run."""
    if model is None or not plan.fit_passes:
        return [{} for _ in plan.runs]
    progress.start("fitting what reduces channels", plan.fit_passes, "passes")
    try:
        return [fit(plan.dataset, one, model, size, progress) for one, size in zip(plan.runs, sizes, strict=True)]
    finally:
        progress.stop()


def _new_batch_size(plan: Plan, model: Backbone | None) -> int:
    """Rows of every forward pass of the plan's new runs."""
    if plan.config.batch_size is not None:
        return plan.config.batch_size
    recipe = plan.runs[0].recipe
    if model is None or plan.device == "cpu":
        return cpu_batch_size(plan.source, recipe.height_px, recipe.width_px)

    def run(rows: int) -> None:
        size = (recipe.height_px, recipe.width_px)
        extractor = extractor_of(model, [planned for planned in plan.runs if planned.run is None], rows)
        images = np.zeros((rows, *size, 3), np.uint8)
        latents = extractor.encode(images)
        for index, planned in enumerate(one for one in plan.runs if one.run is None):
            extractor.run(
                index,
                latents,
                images,
                ["0" * 64] * rows,
                planned.recipe.timestep,
                planned.recipe.seed,
                [""] * rows,
                denoise_from=planned.recipe.denoise_from,
            )

    return probed_batch_size(run, model.device)


def _hardware(plan: Plan) -> str:
    """What the passes run on."""
    if plan.device == "cpu":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name(plan.device)


def _cpu_threads(plan: Plan) -> int | None:
    """Threads that a new run's forward passes get on a CPU: what torch takes here; None where nothing is computed."""
    if plan.device != "cpu" or not plan.passes_todo:
        return None
    import torch

    return torch.get_num_threads()


def _compute(plan: Plan, outcomes: Sequence[RunOutcome], model: Backbone, progress: Progress) -> None:
    """Compute what is missing, and again what another writer of the same blocks has put itself in the place of.

    Where nothing locks a block for good (a bucket, a file system without locks), a process that was thought dead can
    still write one that was given to us; rows of ours may then be gone from its record. They are made once more.
    """
    for _ in range(_ROUNDS):
        compute(plan, outcomes, model, progress)
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

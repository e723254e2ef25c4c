"""Extraction joined up: plan, forward passes, blocks to the store. The one module that knows all stages."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import getpass
import importlib.metadata
import platform
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import featstore.store
from featstore.datasets import Dataset
from featstore.pipelines.batch import cpu_batch_size, probed_batch_size
from featstore.pipelines.flight import Flight, InFlight
from featstore.pipelines.images import BlockImages, ImageReader
from featstore.pipelines.outcome import RunOutcome
from featstore.pipelines.plan import ExtractConfig, Plan, PlannedRun, make_plan, sample_table
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.rates import Rates
from featstore.pipelines.writing import BlockWriter
from featstore.store import Run, StoredDataset

if TYPE_CHECKING:
    from featstore.extraction.forward import Extractor
    from featstore.models.backbones.base import Backbone

_MAX_THREADS = 1024
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
                "reused": images - int(outcome.planned.todo.sum()),
                "failed": [{"key": key, "reason": reason} for key, reason in outcome.failed.items()],
                "layers": {name: list(shape) for name, shape in outcome.planned.layers.items()},
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
        outcomes = _open_runs(plan, stored, model)
        if plan.passes_todo and model is not None:
            _compute(plan, outcomes, model, progress)
    store.finish()
    return ExtractReport(
        plan=plan,
        outcomes=tuple(outcomes),
        seconds=time.perf_counter() - start,
        peak_device_bytes=_peak_device_bytes(plan),
    )


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _peak_device_bytes(plan: Plan) -> int | None:
    """Largest memory that this process took on the plan's GPU; None on a CPU, and where nothing was computed."""
    if plan.device == "cpu" or not plan.passes_todo:
        return None
    import torch

    return torch.cuda.max_memory_allocated(plan.device)


def _open_runs(plan: Plan, stored: StoredDataset, model: Backbone | None) -> list[RunOutcome]:
    provenance = {
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "device": plan.device,
        "cpu_threads": _cpu_threads(plan),
        "host": platform.node(),
        "user": _user(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    rows = np.array([stored.row_of[plan.dataset.samples[index].key] for index in plan.wanted], dtype=int)
    new = _new_batch_size(plan, model) if any(planned.run is None for planned in plan.runs) else 0
    return [
        RunOutcome(
            planned,
            stored.create_run(
                planned.recipe,
                planned.layers,
                batch_size=planned.run.batch_size if planned.run is not None else new,
                provenance=provenance,
            ),
            rows,
        )
        for planned in plan.runs
    ]


def _new_batch_size(plan: Plan, model: Backbone | None) -> int:
    """Rows of every forward pass of the plan's new runs."""
    if plan.config.batch_size is not None:
        return plan.config.batch_size
    recipe = plan.runs[0].recipe
    if model is None or plan.device == "cpu":
        return cpu_batch_size(plan.source, recipe.height_px, recipe.width_px)

    def run(rows: int) -> None:
        size = (recipe.height_px, recipe.width_px)
        extractor = _extractor(model, [planned for planned in plan.runs if planned.run is None], rows)
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


def _cpu_threads(plan: Plan) -> int | None:
    """Threads that a new run's forward passes get on a CPU: what torch takes here; None where nothing is computed."""
    if plan.device != "cpu" or not plan.passes_todo:
        return None
    import torch

    return torch.get_num_threads()


def _threads(run: Run) -> int | None:
    """Threads of every forward pass of a run on a CPU: as many as it was created with; None on a GPU."""
    threads = run.provenance[0].get("cpu_threads")
    return threads if isinstance(threads, int) and 0 < threads <= _MAX_THREADS else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user in a container
        return "unknown"


def _extractor(model: Backbone, runs: Sequence[PlannedRun], batch_size: int) -> Extractor:
    """An extractor for runs of one size and precision."""
    from featstore.extraction.forward import Extractor

    size = runs[0].recipe
    return Extractor(
        model,
        [planned.steering for planned in runs],
        list(runs[0].layers),
        batch_size=batch_size,
        height_px=size.height_px,
        width_px=size.width_px,
        precision=size.precision,
    )


def _compute(plan: Plan, outcomes: Sequence[RunOutcome], model: Backbone, progress: Progress) -> None:
    # Only now: planning and a finished extraction do without torch and diffusers.
    import torch

    # A forward's bytes depend on its batch shape and, on a CPU, on the number of threads; a block is
    # what is committed at once. Only runs that agree on all three can be walked through together.
    groups: dict[tuple[int, int, int | None], list[RunOutcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.planned.todo.any():
            run = outcome.run
            groups[run.block_length, run.batch_size, _threads(run)].append(outcome)
    rates = Rates.load()
    progress.start("extracting", plan.passes_todo, "passes")
    try:
        with ImageReader(plan) as reader, BlockWriter() as writer:
            for (_, batch_size, threads), group in groups.items():
                if threads is not None:
                    torch.set_num_threads(threads)
                extractor = _extractor(model, [outcome.planned for outcome in group], batch_size)
                flight = Flight(plan, writer, rates, progress)
                for images in reader.blocks(group):
                    _block(plan, extractor, group, images, flight)
                flight.land()
    finally:
        progress.stop()
        rates.save()


def _block(
    plan: Plan,
    extractor: Extractor,
    group: Sequence[RunOutcome],
    images: BlockImages,
    flight: Flight,
) -> None:
    """All passes of one block."""
    from featstore.extraction.passes import Pass

    for outcome in group:
        for position, reason in images.failed.items():
            if outcome.planned.todo[position]:
                flight.unreadable(outcome, plan.dataset.samples[plan.wanted[position]].key, reason)
    samples = [plan.dataset.samples[plan.wanted[position]] for position in images.wanted]
    passes, runs = [], []
    for index, outcome in enumerate(group):
        planned = outcome.planned
        chosen = np.flatnonzero(planned.todo[images.wanted])
        if len(chosen):
            runs.append((outcome, chosen))
            passes.append(
                Pass(
                    steering=index,
                    rows=chosen,
                    timestep=planned.recipe.timestep,
                    seed=planned.recipe.seed,
                    captions=_captions(plan.dataset, planned, [samples[i].key for i in chosen]),
                    denoise_from=planned.recipe.denoise_from,
                    noise_ensemble=planned.recipe.noise_ensemble,
                )
            )
    if not passes:
        return
    latents = extractor.encode(images.pixels)
    digests = [sample.digest for sample in samples]
    for index, maps in extractor.run_all(latents, images.pixels, digests, passes):
        outcome, chosen = runs[index]
        keys = [samples[i].key for i in chosen]
        flight.take(InFlight(outcome, images.block, images.wanted[chosen], keys, maps))


def _captions(dataset: Dataset, planned: PlannedRun, keys: Sequence[str]) -> list[str] | None:
    kind, captions = planned.steering.caption_kind, planned.steering.captions
    if captions is not None:
        return [captions.texts[key] for key in keys]
    return None if kind is None else [dataset.caption(key, kind) for key in keys]

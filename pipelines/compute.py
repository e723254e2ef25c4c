"""The passes of an extraction, block by block: claimed, read, encoded, computed, handed to the writer."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from featstore.pipelines.claims import Claims, Work, all_work
from featstore.pipelines.flight import Flight, InFlight
from featstore.pipelines.images import BlockImages, ImageReader
from featstore.pipelines.outcome import RunOutcome
from featstore.pipelines.plan import Plan, PlannedRun
from featstore.pipelines.progress import Progress
from featstore.pipelines.rates import Rates
from featstore.pipelines.reduction import projections
from featstore.pipelines.writing import BlockWriter
from featstore.store import Run
from featstore.store.leases import Keeper

if TYPE_CHECKING:
    from featstore.extraction.forward import Extractor
    from featstore.models.backbones.base import Backbone

_MAX_THREADS = 1024
_POLL_SECONDS = (0.2, 5.0)
"""Time between two looks at blocks that others hold: at first, and at most."""


@dataclasses.dataclass
class Group:
    """Runs that are walked through together, and what is left of them."""

    outcomes: list[RunOutcome]
    extractor: Extractor
    threads: int | None
    work: list[Work]


def compute(plan: Plan, outcomes: Sequence[RunOutcome], model: Backbone, progress: Progress) -> None:
    """Run all passes that ``outcomes`` lack, except for blocks that other processes complete meanwhile.

    Args:
        plan: what they are part of.
        outcomes: runs; what becomes of them is noted in them.
        model: the plan's model.
        progress: told of every block.

    Raises:
        StorageError: if writing fails; what was committed stays.
    """
    rates = Rates.load()
    left = sum(int(outcome.todo.sum()) for outcome in outcomes)
    progress.start("extracting", left, "passes")
    try:
        with Keeper() as keeper, ImageReader(plan) as reader, BlockWriter() as writer:
            claims = Claims(keeper)
            groups = _groups(outcomes, model)
            waits = 0
            while groups:
                for group in groups:
                    walk(plan, group, claims, reader, Flight(plan, claims, writer, rates, progress), progress)
                    group.work = claims.again()
                claims.spared -= _advance(progress, claims.spared)
                groups = [group for group in groups if group.work]
                if groups:
                    _wait(groups, claims, waits, progress)
                    waits += 1
    finally:
        progress.stop()
        rates.save()


def walk(
    plan: Plan,
    group: Group,
    claims: Claims,
    reader: ImageReader,
    flight: Flight,
    progress: Progress,
    device: contextlib.AbstractContextManager[object] | None = None,
) -> None:
    """Run the passes of all blocks that are a group's work and can be claimed.

    Args:
        plan: what the group is part of.
        group: runs and blocks.
        claims: takes the blocks.
        reader: reads their images.
        flight: takes their maps.
        progress: told of what others have made meanwhile.
        device: entered for each block's passes, where threads share the model; reading and writing are outside it.
    """
    # Only now: planning and a finished extraction do without torch and diffusers.
    import torch

    for images in reader.blocks(group.work, claims):
        with device or contextlib.nullcontext():
            if group.threads is not None:
                torch.set_num_threads(group.threads)  # of this thread: OpenMP keeps the number for each
            _block(plan, group, images, flight)
        claims.spared -= _advance(progress, claims.spared)
    flight.land()


def threads_of(run: Run) -> int | None:
    """Threads of every forward pass of a run on a CPU: as many as it was created with; None on a GPU."""
    threads = run.provenance[0].get("cpu_threads")
    return threads if isinstance(threads, int) and 0 < threads <= _MAX_THREADS else None


def extractor_of(model: Backbone, runs: Sequence[PlannedRun], batch_size: int) -> Extractor:
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


def _groups(outcomes: Sequence[RunOutcome], model: Backbone) -> list[Group]:
    agreed = agreeing(outcomes)
    for group in agreed.values():
        for outcome in group:
            outcome.projections = projections(outcome.run, list(outcome.planned.layers), model.device)
    return [
        Group(group, extractor_of(model, [one.planned for one in group], batch_size), threads, all_work(group))
        for (_, batch_size, threads), group in agreed.items()
    ]


def agreeing(outcomes: Sequence[RunOutcome]) -> dict[tuple[int, int, int | None], list[RunOutcome]]:
    """Runs that still lack something, by block length, batch size and threads.

    A forward's bytes depend on its batch shape and, on a CPU, on the number of threads; a block is what is committed
    at once. Only runs that agree on all three can be walked through together.
    """
    found: dict[tuple[int, int, int | None], list[RunOutcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.todo.any():
            run = outcome.run
            found[run.block_length, run.batch_size, threads_of(run)].append(outcome)
    return found


def _wait(groups: Sequence[Group], claims: Claims, waits: int, progress: Progress) -> None:
    if not waits:
        blocks = sum(len(work.outcomes) for group in groups for work in group.work)
        holders = ", ".join(sorted(claims.holders))
        progress.note(f"waiting for {blocks} blocks that are being computed by {holders}")
    first, most = _POLL_SECONDS
    time.sleep(min(first * 1.5**waits, most))


def _advance(progress: Progress, steps: int) -> int:
    if steps:
        progress.advance(steps)
    return steps


def _block(plan: Plan, group: Group, images: BlockImages, flight: Flight) -> None:
    """All passes of one block."""
    from featstore.extraction.passes import Pass

    samples = [plan.dataset.samples[plan.wanted[position]] for position in images.wanted]
    passes, shares = [], []
    for share in images.shares:
        for position, reason in images.failed.items():
            if position in share.positions:
                flight.unreadable(share, position, reason)
        chosen = np.flatnonzero(np.isin(images.wanted, share.positions))
        if not len(chosen):
            flight.empty(share)
            continue
        planned = share.outcome.planned
        shares.append((share, chosen))
        passes.append(
            Pass(
                steering=group.outcomes.index(share.outcome),
                rows=chosen,
                timestep=planned.recipe.timestep,
                seed=planned.recipe.seed,
                captions=planned.captions(plan.dataset, [samples[i].key for i in chosen]),
                denoise_from=planned.recipe.denoise_from,
                noise_ensemble=planned.recipe.noise_ensemble,
                projections=share.outcome.projections,
            )
        )
    if not passes:
        return
    latents = group.extractor.encode(images.pixels)
    digests = [sample.digest for sample in samples]
    for index, maps in group.extractor.run_all(latents, images.pixels, digests, passes):
        share, chosen = shares[index]
        keys = [samples[i].key for i in chosen]
        flight.take(InFlight(share, images.block, images.wanted[chosen], keys, maps))

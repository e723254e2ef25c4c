"""`push` and `pull`: two stores opened, what one lacks found out, copied, and both sides compared."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import featstore.store
from featstore.errors import BadRequestError, NotFoundError
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.space import require_space
from featstore.recipe import canonical_json, sha256_hex
from featstore.store import Store
from featstore.store.copying import RunCopy
from featstore.store.local import LocalObjects
from featstore.store.meaning import Query
from featstore.store.objects import Objects
from featstore.store.transfer import TransferPlan, compare_digests, plan_transfer, transfer
from featstore.store.urls import objects_at


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig:
    """What to copy, from where to where."""

    source: str
    """URL of the store to copy from."""
    target: str
    """URL of the store to copy to; created if there is none."""
    dataset: str | None = None
    """Only this data set; None: all."""
    query: Query = dataclasses.field(default_factory=Query)
    """Only these runs and layers."""
    update_images: bool = False
    """Of an image that is not the same on both sides, take the source's."""
    digests: bool = True
    """Compare the two sides at the end."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """What a transfer did; `to_json` is what ``--json`` prints."""

    config: TransferConfig
    plan: TransferPlan
    copies: tuple[RunCopy, ...]
    seconds: float

    @property
    def copied(self) -> int:
        """Blocks that were written, a block counted once a layer."""
        return sum(copy.copied for copy in self.copies)

    @property
    def skipped(self) -> int:
        """Blocks that the target had already."""
        return sum(copy.lack.blocks()[1] for copy in self.copies)

    @property
    def bytes(self) -> int:
        """Bytes of features that were copied."""
        return sum(copy.bytes for copy in self.copies)

    @property
    def problems(self) -> list[str]:
        """What was not copied, and why."""
        return [problem for copy in self.copies for problem in copy.problems]

    @property
    def digests(self) -> tuple[str, str] | None:
        """Of source and target, over all runs; None: they were not compared."""
        each = {copy.lack.run.path: copy.digests for copy in self.copies}
        sides = [{path: pair[side] for path, pair in each.items() if pair is not None} for side in (0, 1)]
        if not self.config.digests:
            return None
        return sha256_hex(canonical_json(sides[0])), sha256_hex(canonical_json(sides[1]))

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        return plan_json(self.config, self.plan) | {
            "runs": [_run_json(copy) for copy in self.copies],
            "copied": self.copied,
            "skipped": self.skipped,
            "corrupt": self.problems,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "digests": None if self.digests is None else _sides(self.digests),
        }


def plan_json(config: TransferConfig, plan: TransferPlan) -> dict[str, Any]:
    """A plan as plain JSON, for ``--dry-run``."""
    return {
        "source": config.source,
        "target": config.target,
        "datasets": [
            {
                "name": lack.source.name,
                "images": len(lack.source.samples),
                "new_images": lack.new_images,
                "differing_images": list(lack.differing),
            }
            for lack in plan.datasets
        ],
        "runs": [_run_json(RunCopy(lack=run)) | {"bytes": run.bytes_todo} for run in plan.runs],
        "bytes": plan.bytes_todo,
    }


def _run_json(copy: RunCopy) -> dict[str, Any]:
    run = copy.lack.run
    todo, there = copy.lack.blocks()
    return {
        "path": run.path,
        "dataset": run.dataset.name,
        "model": run.recipe.model,
        "technique": run.recipe.technique,
        "timestep": run.recipe.timestep,
        "fingerprint": run.fingerprint,
        "images": copy.lack.images,
        "blocks": todo,
        "copied": copy.copied,
        "skipped": there,
        "corrupt": copy.problems,
        "bytes": copy.bytes,
        "digests": None if copy.digests is None else _sides(copy.digests),
    }


def _sides(digests: tuple[str, str]) -> dict[str, str]:
    return {"source": digests[0], "target": digests[1]}


def make_plan(config: TransferConfig) -> TransferPlan:
    """Find out what is to be copied; nothing is written.

    Raises:
        NotFoundError: if there is no store to copy from, or no such data set in it.
        BadRequestError: for one store with itself, a target that nobody can write, or a query that nothing fits.
        StorageError: if the target's disk could not hold it.
    """
    source, target = objects_at(config.source), objects_at(config.target)
    if _place(source) == _place(target):
        raise BadRequestError(f"{config.source!r} and {config.target!r} are the same store")
    if target.read_only:
        raise BadRequestError(
            f"nothing can be put at {config.target!r}",
            hint="that place is for reading; let others `pull` from here",
        )
    opened = featstore.store.open(config.source)
    try:
        there: Store | None = featstore.store.open(config.target)
    except NotFoundError:
        there = None
    plan = plan_transfer(opened, there, dataset=config.dataset, query=config.query, update_images=config.update_images)
    if isinstance(target, LocalObjects):
        hint = "--dataset, --techniques and --layers copy less, or name another place"
        require_space(target.root, plan.bytes_todo, what="features to copy", hint=hint)
    return plan


def _place(objects: Objects) -> str:
    return str(objects.root.resolve()) if isinstance(objects, LocalObjects) else objects.url.rstrip("/")


def execute(config: TransferConfig, plan: TransferPlan, progress: Progress | None = None) -> TransferReport:
    """Copy what a plan of `make_plan` says.

    Raises:
        StorageError: if the target cannot be written, or either side fails on the way; what was committed stays.
    """
    progress = progress or Silent()
    start = time.perf_counter()
    target = featstore.store.create(config.target)
    progress.start("copying", plan.bytes_todo, "bytes")
    try:
        copies = transfer(plan, target, progress.advance)
    finally:
        progress.stop()
    if config.digests:
        progress.start("comparing", 2 * sum(len(run.layers) for run in plan.runs), "layers")
        try:
            compare_digests(plan, target, copies, progress.advance)
        finally:
            progress.stop()
    return TransferReport(config=config, plan=plan, copies=tuple(copies), seconds=time.perf_counter() - start)

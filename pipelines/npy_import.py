"""Features that other code computed and left as ``.npy`` files, brought into a store.

An imported run is told apart from one that featstore computed, because nobody here knows what made its bytes: its
``scheduler`` is ``imported``, its ``meaning`` 0, and where a computed run has the digest of its weights, it has one
over the names and contents of all files of the folder. Model, technique, timestep, size and text are what the user
said; seed, ensemble and resampling stand at their defaults and claim nothing. So another folder, or one changed file,
makes another run, and the same folder goes on where it was left.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

import featstore.store
from featstore.pipelines.npy_files import UnusableMapError, read_map
from featstore.pipelines.npy_plan import ImportConfig, ImportPlan, make_plan
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.provenance import provenance
from featstore.pipelines.writing import BlockWriter
from featstore.store import Run
from featstore.store.precision import encoded, of, unfit

__all__ = ["ImportConfig", "ImportPlan", "ImportReport", "execute", "import_npy", "make_plan"]

_READING_THREADS = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What an import did; `to_json` is what ``--json`` prints."""

    plan: ImportPlan
    imported: int
    """Images that were stored."""
    failed: Mapping[str, str]
    """Keys of images that have files but could not be imported, with the reason."""
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every image asked for is in the store, and every file was of an image."""
        survey = self.plan.survey
        return not (self.failed or survey.without(self.plan.wanted) or survey.assigned.strangers)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        told = self.plan.to_json()
        del told["import"]
        failed = [{"key": key, "reason": reason} for key, reason in self.failed.items()]
        return told | {"imported": self.imported, "failed": failed, "seconds": self.seconds}


def import_npy(config: ImportConfig, progress: Progress | None = None) -> ImportReport:
    """Plan and run an import; see `make_plan` for what is refused and `execute` for the rest."""
    return execute(make_plan(config, progress), progress)


def execute(plan: ImportPlan, progress: Progress | None = None) -> ImportReport:
    """Copy what a plan leaves to do, layer by layer and block by block.

    A file that changed since the plan, or holds NaN, infinity or what overflows the precision, is left out and named
    in the report. Host memory is bounded by a few blocks of one layer, whatever the size of the folder.

    Raises:
        StorageError: if the store cannot be written; what was committed stays.
    """
    start = time.perf_counter()
    progress = progress or Silent()
    store = featstore.store.create(plan.config.store)
    stored = store.put_samples(plan.dataset_name, plan.table, source=plan.source)
    origin = {"from": str(plan.folder.absolute()), "files": len(plan.survey.digests)}
    made_by = provenance(("featstore", "numpy"), imported=origin)
    run = stored.create_run(plan.recipe, plan.layers, batch_size=1, provenance=made_by)
    failed = dict(plan.survey.failed)
    progress.start("importing", plan.maps_todo, "maps")
    try:
        with BlockWriter() as writer, ThreadPoolExecutor(_READING_THREADS) as pool:
            for layer, block, rows in _blocks(plan, run):
                maps, wrong = _read(plan, layer, rows, pool)
                failed |= wrong
                if len(maps):
                    there = [run.dataset.row_of[plan.table.keys[row]] for row in rows if row not in wrong]
                    writer.submit(run, block, there, {layer: encoded(maps, plan.recipe.precision)})
                progress.advance(len(rows))
    finally:
        progress.stop()
    store.finish([run])
    return ImportReport(
        plan=plan,
        imported=len(plan.rows_todo - failed.keys()),
        failed={plan.table.keys[row]: reason for row, reason in failed.items()},
        seconds=time.perf_counter() - start,
    )


def _blocks(plan: ImportPlan, run: Run) -> Iterator[tuple[str, int, list[int]]]:
    """What is to be written: layer, block, and rows of the plan's table in the order of the store's rows."""
    row_of = run.dataset.row_of
    for layer, rows in plan.missing.items():
        blocks: dict[int, list[int]] = {}
        for row in sorted(rows, key=lambda row: row_of[plan.table.keys[row]]):
            blocks.setdefault(row_of[plan.table.keys[row]] // run.block_length, []).append(row)
        for block, own in blocks.items():
            yield layer, block, own


def _read(plan: ImportPlan, layer: str, rows: Sequence[int], pool: Executor) -> tuple[npt.NDArray[Any], dict[int, str]]:
    """The maps of ``rows`` that can be stored, (n, C, H, W) in the files' widest type, and what is wrong by row."""
    wrong: dict[int, str] = {}
    maps = np.empty((len(rows), *plan.layers[layer]), dtype=max(plan.survey.dtypes, key=lambda dtype: dtype.itemsize))

    def read(place: int) -> None:
        try:
            maps[place] = _read_one(plan, layer, rows[place])
        except UnusableMapError as error:
            wrong[rows[place]] = f"{plan.survey.assigned.files[layer][rows[place]]}: {error}"

    list(pool.map(read, range(len(rows))))
    return maps[[place for place, row in enumerate(rows) if row not in wrong]] if wrong else maps, wrong


def _read_one(plan: ImportPlan, layer: str, row: int) -> npt.NDArray[Any]:
    """One map, (C, H, W), whose values the run's precision can hold.

    Raises:
        UnusableMapError: if it is no such map, or another than when it was digested.
    """
    path = plan.survey.assigned.files[layer][row]
    array, digest = read_map(plan.folder / path)
    if digest != plan.survey.digests[path]:
        raise UnusableMapError("it has changed while the folder was read")
    read_as = of(plan.recipe.precision).read
    peak = float(np.abs(array).max())
    with np.errstate(over="ignore"):
        if not np.isfinite(read_as.type(peak)):
            raise UnusableMapError(unfit(peak, read_as.name))
    return array

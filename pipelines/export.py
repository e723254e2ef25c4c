"""Features of a store as files for those who do not read stores: ``.npy``, safetensors, Hugging Face `datasets`.

An export is a folder with a folder for each run. It appears whole or not at all, and says in ``featstore.json`` and
``samples.jsonl`` what it is.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from featstore.errors import StorageError
from featstore.pipelines import export_index
from featstore.pipelines.export_plan import FORMATS, ExportConfig, ExportPlan, PlannedExport, make_plan
from featstore.pipelines.export_writer import Chunk, Target
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.whole_folder import whole_folder

__all__ = ["FORMATS", "ExportConfig", "ExportPlan", "ExportReport", "execute", "export", "make_plan"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export wrote; `to_json` is what ``--json`` prints."""

    plan: ExportPlan
    bytes: int
    """What its files take."""
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every image that was asked for is in it."""
        return not any(run.left_out for run in self.plan.runs)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        return self.plan.to_json() | {"bytes": self.bytes, "seconds": self.seconds}


def export(config: ExportConfig, progress: Progress | None = None) -> ExportReport:
    """Plan and write an export; see `make_plan` for what is refused and `execute` for the rest."""
    return execute(make_plan(config), progress)


def execute(plan: ExportPlan, progress: Progress | None = None) -> ExportReport:
    """Write what a plan says; the folder appears when all of it is on the disk.

    Host memory is bounded by two chunks of `export_plan.CHUNK_MAX_BYTES`, or two images where one is larger.

    Raises:
        StorageError: if the disk fails or refuses; nothing is left then, and an earlier export stays.
        CorruptError: if stored bytes do not match their checksum.
        NotCommittedError: if features went while they were read.
    """
    start = time.perf_counter()
    progress = progress or Silent()
    out = plan.config.out
    progress.start("exporting", plan.images, "images")
    try:
        with whole_folder(out, replace=plan.config.overwrite) as folder:
            for run in plan.runs:
                _write_run(plan, run, folder / run.folder, progress)
            content = {"kind": "export", **_described(plan), "runs": [_told(run) for run in plan.runs]}
            export_index.write_manifest(folder, content)
            size_bytes = _size_bytes(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"cannot write {out}: {reason}", hint="free space or name another folder") from error
    finally:
        progress.stop()
    return ExportReport(plan=plan, bytes=size_bytes, seconds=time.perf_counter() - start)


def _described(plan: ExportPlan) -> dict[str, Any]:
    return {"format": plan.config.format, "dataset": plan.dataset}


def _told(planned: PlannedExport) -> dict[str, Any]:
    """What ``featstore.json`` says of a run: as the report, but how many images were left out, and not which."""
    return planned.to_json() | {"left_out": len(planned.left_out)}


def _write_run(plan: ExportPlan, planned: PlannedExport, folder: Path, progress: Progress) -> None:
    """Write one run into its folder."""
    folder.mkdir()
    target = Target(folder=folder, run=planned.run, layers=planned.layers, chunks=len(planned.chunks()))
    writer = FORMATS[plan.config.format].open_writer(target)
    with (folder / export_index.SAMPLES).open("w", encoding="utf-8") as index:
        for chunk in _chunks(planned):
            files = writer.write(chunk)
            for key, split, digest, file in zip(chunk.keys, chunk.splits, chunk.digests, files, strict=True):
                export_index.write_sample(index, export_index.Exported(key=key, split=split, digest=digest, file=file))
            progress.advance(len(files))
    writer.finish()
    content = {"kind": "run", **_described(plan), **_told(planned), "recipe": planned.run.recipe.to_json()}
    export_index.write_manifest(folder, content)


def _chunks(planned: PlannedExport) -> Iterator[Chunk]:
    """The images of a run in their order, the next ones being read while one is written."""
    samples = planned.run.dataset.samples
    keys, splits, digests = samples.keys, samples.splits, samples.digests
    pieces = planned.chunks()

    def read(number: int) -> Chunk:
        rows = pieces[number].tolist()
        return Chunk(
            number=number,
            keys=tuple(keys[row] for row in rows),
            splits=tuple(splits[row] for row in rows),
            digests=tuple(digests[row] for row in rows),
            maps={layer: planned.run.numpy(layer, pieces[number]) for layer in planned.layers},
        )

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, 0)
        for number in range(len(pieces)):
            chunk = ahead.result()
            if number + 1 < len(pieces):
                ahead = pool.submit(read, number + 1)
            yield chunk


def _size_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    return sum((Path(place) / name).stat().st_size for place, _, names in os.walk(folder) for name in names)

"""What an export would write, found out before it writes anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import featstore.datasets
import featstore.store
import featstore.techniques
from featstore.errors import BadRequestError, NotCommittedError, unknown_name
from featstore.pipelines import export_datasets, export_index, export_npy, export_safetensors
from featstore.pipelines.export_writer import ExportedLayer, Format
from featstore.pipelines.reading import expand_names, model_name
from featstore.pipelines.selection import select_rows
from featstore.pipelines.space import require_space
from featstore.recipe import TRAIN_TIMESTEPS
from featstore.store import Run, Store
from featstore.store.read import extract_request

FORMATS: Mapping[str, Format] = {one.NAME: one for one in (export_npy, export_safetensors, export_datasets)}
"""Every format by the name that people type. A new one is a module with the names of `Format`, and a place here."""
CHUNK_MAX_BYTES = 256 << 20
"""Maps that are in memory at once, and in one file where a file holds several images."""

Rows = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """What to export, and where to."""

    out: Path
    """Folder to write; it must not be there, or be empty."""
    dataset: str
    """Name of the data set in the store, or as it was named to extract it."""
    techniques: str
    """Technique expression as it was extracted."""
    format: str
    """One of `FORMATS`."""
    store: str = "features.zarr"
    """URL of the store."""
    model: str | None = None
    """Name or folder of the model; None: the only one there is."""
    timesteps: tuple[int, ...] = (50,)
    """One run a technique and timestep."""
    fingerprint: str | None = None
    """First digits of the fingerprint of the one run that is meant; None: it needs none."""
    layers: str | None = None
    """Presets and layer names, comma separated; None: all that a run has."""
    split: str | None = None
    """Only this split's images; None: all."""
    limit: int | None = None
    """Only the first so many images; None: all."""
    overwrite: bool = False
    """Whether an earlier export may be replaced."""
    data_root: Path | None = None
    """Where data sets lie."""
    dataset_name: str | None = None
    """Name of the data set in the store; None: the data set's own."""

    def __post_init__(self) -> None:
        """Refuse values that need nothing else to be known wrong."""
        if self.format not in FORMATS:
            raise unknown_name("format", self.format, FORMATS)
        for timestep in self.timesteps:
            if not 0 <= timestep < TRAIN_TIMESTEPS:
                raise BadRequestError(f"timestep {timestep} is outside 0..{TRAIN_TIMESTEPS - 1}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlannedExport:
    """One run of the plan."""

    run: Run
    folder: str
    """Name of its folder in the export."""
    layers: Mapping[str, ExportedLayer]
    rows: Rows
    """Rows of the store's table that are exported, ascending."""
    left_out: tuple[str, ...]
    """Keys of images that were asked for and have no features, or those of an earlier state of the image."""
    bytes: int
    """About what its files will take."""

    def chunks(self) -> list[Rows]:
        """The rows in pieces that are read, and held in memory, at once; none reaches over a block."""
        image_bytes = sum(layer.map_bytes for layer in self.layers.values())
        length = max(1, CHUNK_MAX_BYTES // image_bytes)
        blocks = np.split(self.rows, np.flatnonzero(np.diff(self.rows // self.run.block_length)) + 1)
        return [block[start : start + length] for block in blocks for start in range(0, len(block), length)]

    def to_json(self) -> dict[str, Any]:
        """What is said of it, in the report and in ``featstore.json``."""
        return {
            "folder": self.folder,
            "model": self.run.recipe.model,
            "technique": self.run.recipe.technique,
            "timestep": self.run.recipe.timestep,
            "fingerprint": self.run.fingerprint,
            "images": len(self.rows),
            "left_out": list(self.left_out),
            "layers": {
                name: {"shape": list(layer.shape), "dtype": layer.dtype.name} for name, layer in self.layers.items()
            },
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """Everything that an export would do."""

    config: ExportConfig
    dataset: str
    """Name of the data set in the store."""
    runs: tuple[PlannedExport, ...]

    @property
    def bytes(self) -> int:
        """About what all files will take."""
        return sum(run.bytes for run in self.runs)

    @property
    def images(self) -> int:
        """Images, once for each run."""
        return sum(len(run.rows) for run in self.runs)

    def to_json(self) -> dict[str, Any]:
        """The plan for ``--dry-run --json``."""
        return {
            "out": str(self.config.out),
            "format": self.config.format,
            "dataset": self.dataset,
            "runs": [run.to_json() | {"bytes": run.bytes} for run in self.runs],
            "bytes": self.bytes,
        }


def make_plan(config: ExportConfig) -> ExportPlan:
    """Find the runs and rows that ``config`` asks for, and how much they take.

    Raises:
        BadRequestError: for anything that was named and does not exist or cannot be, such as a folder that is taken.
        NotCommittedError: if the store has no such run, layer or image.
        StorageError: if the disk could not hold it.
    """
    _check_place(config)
    form = FORMATS[config.format]
    techniques = featstore.techniques.parse(config.techniques)
    store = featstore.store.open(config.store)
    stored = store.dataset(_stored_name(config, store))
    model = None if config.model is None else model_name(config.model)
    wanted = np.array(select_rows(stored.samples.splits, split=config.split, limit=config.limit), dtype=np.int64)
    runs = []
    for technique in techniques:
        for timestep in config.timesteps:
            run = stored.run(technique.expression, timestep=timestep, model=model, fingerprint=config.fingerprint)
            runs.append(_planned(run, config, wanted, form))
    plan = ExportPlan(config=config, dataset=stored.name, runs=tuple(runs))
    require_space(config.out, plan.bytes, what="exported files", hint="fewer --layers or --limit take less")
    return plan


def _check_place(config: ExportConfig) -> None:
    """Refuse to write where something is that an export must not replace."""
    out = config.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise BadRequestError(f"{out} is a file", hint="name a folder that is not there yet")
    if not export_index.is_export(out):
        raise BadRequestError(f"{out} is no earlier export, and is not replaced", hint="name another folder")
    if not config.overwrite:
        raise BadRequestError(f"{out} exists already", hint="--overwrite replaces it, or name another folder")


def _stored_name(config: ExportConfig, store: Store) -> str:
    """What the data set is called in the store: it may be named so, or as it was named to extract it."""
    if config.dataset_name is not None:
        return config.dataset_name
    if config.dataset in store.datasets():
        return config.dataset
    return featstore.datasets.resolve(config.dataset, data_root=config.data_root).info.name


def _planned(run: Run, config: ExportConfig, wanted: Rows, form: Format) -> PlannedExport:
    names = list(run.layers) if config.layers is None else expand_names(config.layers, run.layers, run.recipe.model)
    form.require(names)
    readers = {name: run.reader(name) for name in names}
    there = run.valid(names)[wanted]
    keys = run.dataset.samples.keys
    if not there.any():
        raise NotCommittedError(
            f"of {len(wanted)} images asked for, none has features in {run.path}",
            hint=f"{extract_request(run.dataset.name, run.recipe)} --layers {','.join(names)}",
        )
    layers = {name: ExportedLayer(shape=reader.shape, dtype=reader.dtype) for name, reader in readers.items()}
    image_bytes = sum(layer.map_bytes + form.overhead_bytes(layer) for layer in layers.values())
    return PlannedExport(
        run=run,
        folder=run.recipe.path.replace("/", "-"),
        layers=layers,
        rows=wanted[there],
        left_out=tuple(keys[row] for row in wanted[~there].tolist()),
        bytes=int(there.sum()) * image_bytes,
    )

"""What an import of ``.npy`` files would do, found out before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import featstore.datasets
import featstore.store
from featstore.errors import BadRequestError, NotFoundError, unknown_name
from featstore.models import MODELS
from featstore.pipelines.npy_claims import Claims, open_folder
from featstore.pipelines.npy_layout import LAYOUTS
from featstore.pipelines.npy_survey import NAMES, Survey, survey
from featstore.pipelines.plan import sample_table
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.selection import select_rows
from featstore.pipelines.space import require_space
from featstore.recipe import PRECISIONS, Recipe
from featstore.store import Run, SampleTable, Store
from featstore.store.layout import Shape
from featstore.store.precision import image_bytes, of
from featstore.store.urls import local_path


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImportConfig:
    """What to import, and what the files do not say of themselves."""

    folder: Path
    """Where the files lie: a folder of the seed code, or one run of featstore's own export to ``.npy``."""
    dataset: str
    """Name of a known data set, ``folder:PATH``, or a data set that is in the store."""
    store: str = "features.zarr"
    """URL of the store."""
    model: str | None = None
    """Name of the model that made them; None: the export says it."""
    technique: str | None = None
    """Technique expression of the pass; None: the export says it."""
    timestep: int | None = None
    """What the UNet was fed; None: the export says it."""
    image_size_px: int | tuple[int, int] | None = None
    """Side of the model's input, or its (height, width); None: the export says it."""
    prompt: str | None = None
    """The text of the pass; None: the export says it, or it is not known."""
    denoise_from: int | None = None
    """Timestep at which a short denoising began; None: one noised pass."""
    compute_dtype: str | None = None
    """Element type of the forward pass; None: the export says it, else float16."""
    layout: str | None = None
    """One of `npy_layout.LAYOUTS`; None: the one that fits."""
    names: str | None = None
    """How images are named, one of `npy_survey.NAMES`; None: what fits."""
    layers: tuple[str, ...] | None = None
    """Names that layers are to have in the store; None: all."""
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Name of a layer in the store by its name in the folder."""
    precision: str | None = None
    """Element type on disk; None: float16 if all files are, else float32."""
    split: str | None = None
    """Only this split's images; None: all."""
    limit: int | None = None
    """Only the first so many images; None: all."""
    data_root: Path | None = None
    """Where data sets lie."""
    dataset_name: str | None = None
    """Name of the data set in the store; None: the data set's own."""

    def __post_init__(self) -> None:
        """Refuse values that need nothing else to be known wrong."""
        for kind, value, known in (
            ("layout", self.layout, LAYOUTS),
            ("way of naming images", self.names, NAMES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value is not None and value not in known:
                raise unknown_name(kind, value, known)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImportPlan:
    """Everything that an import would do."""

    config: ImportConfig
    folder: Path
    dataset_name: str
    source: str
    """Where the data set comes from, a sentence."""
    table: SampleTable
    wanted: tuple[int, ...]
    """Rows of ``table`` that were asked for."""
    survey: Survey
    recipe: Recipe
    run: Run | None
    """The run in the store; None: it is new."""
    missing: Mapping[str, tuple[int, ...]]
    """For each layer, rows of ``table`` that the store lacks and the folder has."""
    notes: tuple[str, ...] = ()
    """What the user should know, a line each."""

    @property
    def layers(self) -> Mapping[str, Shape]:
        """Shapes (C, H, W) by name."""
        return self.survey.layers

    @property
    def rows_todo(self) -> frozenset[int]:
        """Rows of images of which the store lacks a layer or all."""
        return frozenset(row for rows in self.missing.values() for row in rows)

    @property
    def maps_todo(self) -> int:
        """Maps to import, one an image and layer."""
        return sum(len(rows) for rows in self.missing.values())

    @property
    def bytes_todo(self) -> int:
        """Bytes that the import would add to the store."""
        stored = of(self.recipe.precision).stored
        return sum(len(rows) * image_bytes(self.layers[layer], stored) for layer, rows in self.missing.items())

    @property
    def reused(self) -> int:
        """Images that the store has already."""
        return len(self.survey.complete(self.wanted)) - len(self.rows_todo)

    def keys(self, rows: Sequence[int]) -> list[str]:
        """Keys of rows of the table."""
        return [self.table.keys[row] for row in rows]

    def to_json(self) -> dict[str, Any]:
        """The plan for ``--dry-run --json``."""
        return {
            "folder": str(self.folder),
            "dataset": self.dataset_name,
            "model": self.recipe.model,
            "technique": self.recipe.technique,
            "timestep": self.recipe.timestep,
            "fingerprint": self.recipe.fingerprint,
            "layout": self.survey.assigned.layout,
            "names": self.survey.assigned.names,
            "layers": {name: list(shape) for name, shape in self.layers.items()},
            "precision": self.recipe.precision,
            "images": len(self.wanted),
            "import": len(self.rows_todo),
            "reused": self.reused,
            "failed": [{"key": self.table.keys[row], "reason": why} for row, why in self.survey.failed.items()],
            "without_files": self.keys(self.survey.without(self.wanted)),
            "strangers": list(self.survey.assigned.strangers),
            "bytes": self.bytes_todo,
        }


def make_plan(config: ImportConfig, progress: Progress | None = None) -> ImportPlan:
    """Find out what the folder holds and what of it the store has; every file is read once, to digest it.

    Raises:
        BadRequestError: for anything that was said and cannot be, and where no image can be imported.
        NotFoundError: if there is no such folder or data set.
        StorageError: if the disk could not hold it.
    """
    folder, manifest = open_folder(config.folder)
    if manifest is not None and (config.layout or config.names):
        raise BadRequestError(
            f"{folder} is an export, whose list says what its files are",
            hint="leave out --layout and --names, which are for folders of other code",
        )
    size = config.image_size_px
    said = {
        "model": config.model,
        "technique": config.technique,
        "timestep": config.timestep,
        "image_size_px": (size, size) if isinstance(size, int) else size,
        "prompt": config.prompt,
        "denoise_from": config.denoise_from,
        "compute_dtype": config.compute_dtype,
    }
    claims = Claims.of(said, manifest, folder)
    # What cannot be is refused before any file is read.
    claims.recipe(digest="0" * 64, precision="float32", details={})
    store = _open_if_there(config.store)
    name, source, table = _samples(config, store)
    wanted = select_rows(table.splits, split=config.split, limit=config.limit)
    found = survey(
        folder,
        table,
        wanted,
        progress=progress or Silent(),
        layout=config.layout,
        naming=config.names,
        layers=config.layers,
        renamed=config.renamed,
        listed=manifest is not None,
    )
    complete = found.complete(wanted)
    if not complete:
        reason = next((f": {table.keys[row]}: {why}" for row, why in found.failed.items()), "")
        raise BadRequestError(f"of {len(wanted)} images asked for, none has usable files in {folder}{reason}")
    narrow = found.dtypes == {np.dtype(np.float16)}
    recipe = claims.recipe(
        digest=found.digest,
        precision=config.precision or ("float16" if narrow else "float32"),
        details=_details(config, found),
    )
    stored = store.dataset(name) if store is not None and name in store.datasets() else None
    run = stored.find(recipe) if stored is not None else None
    plan = ImportPlan(
        config=config,
        folder=folder,
        dataset_name=name,
        source=source,
        table=table,
        wanted=tuple(wanted),
        survey=found,
        recipe=recipe,
        run=run,
        missing={layer: _missing(run, layer, table, complete) for layer in found.layers},
        notes=_notes(recipe, found),
    )
    if "://" not in config.store or config.store.startswith("file://"):
        require_space(
            local_path(config.store), plan.bytes_todo, what="features", hint="fewer --layers or --limit take less"
        )
    return plan


def _open_if_there(url: str) -> Store | None:
    try:
        return featstore.store.open(url)
    except NotFoundError:
        return None


def _samples(config: ImportConfig, store: Store | None) -> tuple[str, str, SampleTable]:
    """Name, source and samples of the data set; those in the store if its images are not on this machine."""
    try:
        dataset = featstore.datasets.resolve(config.dataset, data_root=config.data_root)
    except (NotFoundError, BadRequestError):
        name = config.dataset_name or config.dataset
        if store is None or name not in store.datasets():
            raise
        return name, "the store itself", store.dataset(name).samples.table()
    return config.dataset_name or dataset.info.name, dataset.info.source, sample_table(dataset)


def _details(config: ImportConfig, found: Survey) -> dict[str, Any]:
    """How files were taken for images and layers: what else than their bytes decides what is stored."""
    details: dict[str, Any] = {"format": "npy", "layout": found.assigned.layout, "names": found.assigned.names}
    if found.names_digest is not None:
        details["names_sha256"] = found.names_digest
    if config.renamed:
        details["renamed"] = dict(config.renamed)
    return details


def _missing(run: Run | None, layer: str, table: SampleTable, rows: Sequence[int]) -> tuple[int, ...]:
    """Those of ``rows`` whose map of today's image the store does not hold."""
    if run is None or layer not in run.layers:
        return tuple(rows)
    valid, row_of, digests = run.valid([layer]), run.dataset.row_of, run.dataset.samples.digests

    def there(row: int) -> bool:
        own = row_of.get(table.keys[row])
        return own is not None and digests[own] == table.digests[row] and bool(valid[own])

    return tuple(row for row in rows if not there(row))


def _notes(recipe: Recipe, found: Survey) -> tuple[str, ...]:
    notes = []
    if recipe.model not in tuple(MODELS):
        near = unknown_name("model", recipe.model, tuple(MODELS)).hint
        note = f"featstore does not know a model {recipe.model!r}; the name is kept as it was given"
        notes.append(f"{note}; {near}" if near else note)
    widest = max(found.dtypes, key=lambda dtype: dtype.itemsize)
    if widest.itemsize > of(recipe.precision).stored.itemsize:
        notes.append(f"maps of {widest} are rounded to {recipe.precision}")
    return tuple(notes)

"""What a report says of a store: what is in it, what is missing, how it was made, what it looks like."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import featstore.datasets
from featstore.datasets import Dataset
from featstore.errors import BadRequestError, FeatstoreError
from featstore.pictures import Details, Panel, PanelTable, Section, Table
from featstore.pipelines.reading import ATTENTION_PREFIX
from featstore.pipelines.report.documents import pretty
from featstore.pipelines.report.failures import failures, reasons_of
from featstore.pipelines.show_panels import pca_pictures, spread
from featstore.store import Run, Store, StoredDataset
from featstore.store.catalog import describe
from featstore.store.differences import in_words

_log = logging.getLogger(__name__)

MAX_COLUMNS = 12
_NAMED_KEYS = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Which pictures are made of a data set."""

    images: int = 4
    """How many images; 0: none."""
    dataset: str | None = None
    """Data set to take the images themselves from; None: the known data set of that name."""
    data_root: Path | None = None
    """Where data sets lie."""
    seed: int = 0
    """Of the choice of images, and of the positions that the PCA is fitted on."""


def store_sections(store: Store, sampling: Sampling) -> tuple[list[Section], str]:
    """Sections on all data sets of a store, and the sentence that leads to them.

    Raises:
        BadRequestError: if ``sampling`` names a data set that the store does not have.
    """
    content = describe(store)
    names = [entry["name"] for entry in content["datasets"]]
    images = _images_of(sampling, names)
    sections: list[Section] = []
    reasons = reasons_of(store)
    for entry in content["datasets"]:
        stored = store.dataset(entry["name"])
        sections.append(_runs(entry))
        if gaps := _missing(stored, entry):
            sections.append(gaps)
            if failed := failures(stored, entry, reasons):
                sections.append(failed)
        if entry["runs"]:
            sections.append(_layers(entry))
        if sampling.images:
            sections += _looks(stored, images if images and images.info.name == stored.name else None, sampling)
        if entry["runs"]:
            sections.append(_recipes(entry))
    count = sum(len(entry["runs"]) for entry in content["datasets"])
    whole = sum(run["committed"] == run["images"] for entry in content["datasets"] for run in entry["runs"])
    lead = (
        f"{count} runs of {len(names)} data sets, {_megabytes(content['bytes'])}: {', '.join(names) or 'none'}; "
        f"{whole} runs are complete."
    )
    return sections, lead


def _megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"


def _run_name(run: Any) -> str:
    return f"{run['technique']} at t = {run['timestep']}, {run['model']}"


def _runs(entry: Any) -> Table:
    several = any(run["differs"] for run in entry["runs"])
    columns = ("technique", "t", "model", "images", "layers", "size", "fingerprint")
    rows = tuple(
        (
            run["technique"],
            run["timestep"],
            run["model"],
            f"{run['committed']}\u00a0of\u00a0{run['images']}",
            len(run["layers"]),
            _megabytes(sum(layer["bytes"] for layer in run["layers"].values())),
            run["fingerprint"][:8],
            *((in_words(run["differs"]),) if several else ()),
        )
        for run in entry["runs"]
    )
    return Table(
        title=f"{entry['name']}: {entry['images']} images, {len(rows)} runs",
        columns=(*columns, "differs") if several else columns,
        rows=rows,
    )


def _missing(stored: StoredDataset, entry: Any) -> Table | None:
    """Images without features, run by run; None if there are none."""
    described = {run["path"]: run for run in entry["runs"] if run["committed"] < run["images"]}
    rows = []
    for path, run in described.items():
        opened = stored.open_run(path)
        lacking = np.flatnonzero(~opened.valid(list(opened.layers)))
        keys = ", ".join(stored.samples.keys[row] for row in lacking[:_NAMED_KEYS])
        more = f" and {len(lacking) - _NAMED_KEYS} more" if len(lacking) > _NAMED_KEYS else ""
        rows.append((_run_name(run), len(lacking), keys + more))
    if not rows:
        return None
    return Table(
        title=f"{entry['name']}: images without features",
        columns=("run", "images", "which"),
        rows=tuple(rows),
        note="They were not asked for, changed since, or could not be read; the same extract command tries them again "
        "and says why one fails.",
    )


def _layers(entry: Any) -> Table:
    found: dict[str, tuple[Any, int, int]] = {}
    for run in entry["runs"]:
        for name, layer in run["layers"].items():
            shape, runs, size_bytes = found.get(name, (layer, 0, 0))
            found[name] = (shape, runs + 1, size_bytes + layer["bytes"])
    return Table(
        title=f"{entry['name']}: layers",
        columns=("layer", "shape", "stored as", "runs", "size"),
        rows=tuple(
            (name, " x ".join(map(str, layer["shape"])), layer["dtype"], runs, _megabytes(size_bytes))
            for name, (layer, runs, size_bytes) in found.items()
        ),
    )


def _recipes(entry: Any) -> Details:
    return Details(
        title=f"{entry['name']}: how each run was made",
        entries=tuple(
            (
                f"{_run_name(run)} ({run['fingerprint'][:8]})",
                pretty(
                    {
                        "recipe": run["recipe"],
                        "fingerprint": run["fingerprint"],
                        "batch size": run["batch_size"],
                        "made": run["provenance"],
                    }
                ),
            )
            for run in entry["runs"]
        ),
        note="A recipe is everything but the image that decides the bytes of a feature.",
    )


def _images_of(sampling: Sampling, names: Sequence[str]) -> Dataset | None:
    """The data set that images are taken from, None where there is none at hand."""
    if sampling.dataset is not None:
        found = featstore.datasets.resolve(sampling.dataset, data_root=sampling.data_root)
        if found.info.name not in names:
            raise BadRequestError(
                f"data set {found.info.name!r} is not in the store; it has {', '.join(names) or 'none'}"
            )
        return found
    for name in names:
        try:
            return featstore.datasets.resolve(name, data_root=sampling.data_root)
        except FeatstoreError as error:  # its files are elsewhere: features are shown without their images
            _log.debug("no images of %s: %s", name, error)
    return None


def pictured_runs(runs: Sequence[Run]) -> tuple[list[Run], list[str], np.ndarray]:
    """Runs that can be seen side by side, the layers that they share, and the rows that all of them have.

    Runs of the model that has most of them, in the largest set of layers; those that have the fewest images
    are left out where nothing would be common to all.
    """
    models: dict[str, list[Run]] = {}
    for run in runs:
        if any(not name.startswith(ATTENTION_PREFIX) for name in run.layers):
            models.setdefault(run.recipe.model, []).append(run)
    if not models:
        return [], [], np.array([], dtype=int)
    chosen = max(models.values(), key=len)

    def shared(some: Sequence[Run]) -> list[str]:
        first = next(iter(some))
        return [
            name
            for name, info in first.layers.items()
            if not name.startswith(ATTENTION_PREFIX)
            and all(name in run.layers and run.layers[name].shape == info.shape for run in some)
        ]

    there = {run.path: run.valid(list(run.layers)) for run in chosen}
    chosen = sorted((run for run in chosen if there[run.path].any()), key=lambda run: -int(there[run.path].sum()))
    while chosen and not (shared(chosen) and np.logical_and.reduce([there[run.path] for run in chosen]).any()):
        chosen.pop()
    chosen = sorted(chosen, key=lambda run: (run.recipe.timestep, run.path))[:MAX_COLUMNS]
    if not chosen:
        return [], [], np.array([], dtype=int)
    return chosen, shared(chosen), np.flatnonzero(np.logical_and.reduce([there[run.path] for run in chosen]))


def _looks(stored: StoredDataset, dataset: Dataset | None, sampling: Sampling) -> list[Section]:
    """PCA pictures of a few images; nothing where no features are complete."""
    every = stored.runs()
    runs, layers, complete = pictured_runs(every)
    if not runs or not len(complete):
        return []
    some = np.linspace(0, len(complete) - 1, min(sampling.images, len(complete))).astype(int)
    rows = complete[np.unique(some)]
    titles = [f"{run.recipe.technique}, t = {run.recipe.timestep}" for run in runs]
    unique = {
        title if titles.count(title) == 1 else f"{title} ({run.fingerprint[:8]})": run
        for title, run in zip(titles, runs, strict=True)
    }
    seen = pca_pictures(unique, layers, rows, further=spread(complete, rows), seed=sampling.seed)
    keys = [stored.samples.keys[row] for row in rows]
    panels = [Panel(title=title, pictures=tuple(shown)) for title, shown in seen.items()]
    if dataset is not None:
        today = {sample.key: sample.digest for sample in dataset.samples}
        inputs = tuple(
            dataset.image(key) if today.get(key) == stored.samples.digests[row] else None
            for key, row in zip(keys, rows, strict=True)
        )
        panels.insert(0, Panel(title="input", pictures=inputs))
    left_out = len(every) - len(runs)
    note = f"The first three principal components of {', '.join(layers)}, with one basis for all runs: equal colours "
    note += "are equal features."
    note += f" Not shown, for they have other layers or images: {left_out} of {len(every)} runs." if left_out else ""
    title = f"{stored.name}: what the features look like"
    return [PanelTable(title=title, panels=tuple(panels), row_titles=tuple(keys), note=note)]

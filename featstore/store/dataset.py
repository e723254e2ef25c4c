"""A data set in a store: its sample table and the runs over it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

from featstore.errors import (
    BadRequestError,
    CorruptError,
    IncompatibleError,
    NotCommittedError,
    NotFoundError,
    StorageError,
)
from featstore.recipe import Recipe, canonical_json
from featstore.store import catalog, layout, metadata
from featstore.store.objects import Objects
from featstore.store.run import LayerInfo, Run
from featstore.store.samples import SampleTable

_log = logging.getLogger(__name__)


def read_samples(objects: Objects, name: str) -> SampleTable:
    """The sample table of data set ``name`` as it is on disk now.

    Raises:
        NotFoundError: if there is no such data set.
        CorruptError: if its document is damaged.
    """
    key = f"{layout.check_segment('data set', name)}/{layout.ROOT}"
    own = metadata.own(metadata.read(objects, key))
    if own.get("kind") != "dataset" or own.get("name") != name:
        raise CorruptError(f"{key} does not describe data set {name!r}", hint=metadata.remedy(key))
    return SampleTable.from_json(own.get("samples", {}), key)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """The runs that a head amalgamates."""

    runs: tuple[Run, ...]
    """K runs: all timesteps of the first technique, then of the second, and so on."""


class StoredDataset:
    """A data set in a store, with the sample table as it was when this object was made."""

    def __init__(self, objects: Objects, name: str, samples: SampleTable, *, writable: bool) -> None:
        self.objects = objects
        self.name = name
        self.samples = samples
        self.writable = writable

    def __repr__(self) -> str:
        return f"<StoredDataset {self.name} of {len(self.samples)} images in {self.objects.url!r}>"

    @cached_property
    def row_of(self) -> Mapping[str, int]:
        """Row of each key."""
        return MappingProxyType({key: row for row, key in enumerate(self.samples.keys)})

    def require_writable(self) -> None:
        """Raise StorageError if the store was opened for reading."""
        if not self.writable:
            raise StorageError(
                f"{self.objects.url!r} was opened for reading only", hint="open it with featstore.create(url)"
            )

    def runs(self) -> list[Run]:
        """All runs over this data set that this version understands, ordered by their path."""
        found = []
        for path in catalog.paths(self.objects, self.name):
            try:
                found.append(self.open_run(path))
            except IncompatibleError as error:
                # A colleague's newer featstore must not take the older runs from everybody else.
                _log.warning("%s is passed over: %s", path, error)
        return found

    def open_run(self, path: str) -> Run:
        """The run at ``path`` below the store.

        Raises:
            CorruptError: if its document is gone or damaged.
            IncompatibleError: if another version made it.
        """
        key = f"{path}/{layout.ROOT}"
        try:
            document = metadata.read(self.objects, key)
        except NotFoundError:
            raise CorruptError(f"{key} is gone, though the catalog names it", hint=metadata.remedy(key)) from None
        try:
            return Run(self, path, document)
        except (KeyError, TypeError, AttributeError, BadRequestError) as error:
            raise CorruptError(f"{key} does not describe a run: {error!r}", hint=metadata.remedy(key)) from None

    def find(self, recipe: Recipe) -> Run | None:
        """The run of exactly this recipe, or None.

        Raises:
            IncompatibleError: if another recipe with the same 8 hex digits stands in its place.
        """
        path = layout.run_path(self.name, recipe.path)
        if not self.objects.exists(f"{path}/{layout.ROOT}"):
            return None
        run = self.open_run(path)
        if run.fingerprint != recipe.fingerprint:
            raise IncompatibleError(
                f"{path} holds a run with fingerprint {run.fingerprint[:16]}, not {recipe.fingerprint[:16]}: "
                "two recipes share their first 8 hex digits",
                hint="change the seed, or use another --store for one of the two",
            )
        return run

    def run(
        self,
        technique: str,
        *,
        timestep: int | None = None,
        model: str | None = None,
        fingerprint: str | None = None,
    ) -> Run:
        """The one run of ``technique`` that fits.

        Args:
            technique: the expression as it was typed when extracting, e.g. ``controlnet``.
            timestep: 0..999; None if there is only one.
            model: name of the model; None if there is only one.
            fingerprint: the first digits of the fingerprint, to tell apart runs that differ otherwise.

        Raises:
            NotCommittedError: if there is none; the message lists what there is.
            BadRequestError: if several fit; the message says in what they differ.
        """
        runs = self.runs()
        fitting = [
            run
            for run in runs
            if run.recipe.technique == technique
            and timestep in (None, run.recipe.timestep)
            and model in (None, run.recipe.model)
            and run.fingerprint.startswith(fingerprint or "")
        ]
        if len(fitting) == 1:
            return fitting[0]
        asked = f"technique {technique!r}" + "".join(
            f", {what} {value}"
            for what, value in (("timestep", timestep), ("model", model), ("fingerprint", fingerprint))
            if value is not None
        )
        if not fitting:
            there = sorted({f"{r.recipe.technique} at {r.recipe.timestep} ({r.recipe.model})" for r in runs})
            options = f" --timesteps {timestep}" if timestep is not None else ""
            options += f" --model {model}" if model is not None else ""
            raise NotCommittedError(
                f"no features of data set {self.name!r} with {asked}; there are: {', '.join(there) or 'none'}",
                hint=f"featstore extract --dataset {self.name} --techniques {technique}{options}",
            )
        raise BadRequestError(
            f"{len(fitting)} runs of data set {self.name!r} have {asked}: {_differences(fitting)}",
            hint="name the timestep and model, or the first digits of one fingerprint",
        )

    def bucket(
        self, techniques: Sequence[str], *, timesteps: Sequence[int] = (50,), model: str | None = None
    ) -> Bucket:
        """The runs of all ``techniques`` at all ``timesteps``, technique by technique; errors of `run`."""
        runs = [self.run(technique, timestep=t, model=model) for technique in techniques for t in timesteps]
        return Bucket(runs=tuple(runs))

    def create_run(
        self,
        recipe: Recipe,
        layers: Mapping[str, layout.Shape],
        *,
        batch_size: int,
        provenance: Mapping[str, Any],
    ) -> Run:
        """The run of ``recipe`` with at least ``layers``, created or completed where it is missing.

        A run that exists keeps its block length and batch size. Calling it again changes nothing,
        and mends array documents and catalog entries that are damaged.

        Args:
            recipe: what decides the bytes.
            layers: (C, H, W) by name.
            batch_size: images in every forward pass of the run.
            provenance: versions, who, when, on what; plain JSON, kept with the layers it made.

        Raises:
            BadRequestError: for names or shapes that cannot be.
            IncompatibleError: for another recipe in the same place, or a layer of another shape.
            StorageError: if the disk fails or refuses.
        """
        self.require_writable()
        if batch_size < 1:
            raise BadRequestError(f"batch size {batch_size} is not positive")
        shapes = _checked_layers(layers)
        path = layout.run_path(self.name, recipe.path)
        for folder, kind in ((path.rsplit("/", 2)[0], "model"), (path.rsplit("/", 1)[0], "technique")):
            put_group(self.objects, folder, kind, recipe)
        with self.objects.lock(path):
            run = self.find(recipe)
            known = {name: info.shape for name, info in run.layers.items()} if run else {}
            for name in shapes.keys() & known.keys():
                if shapes[name] != known[name]:
                    raise IncompatibleError(f"layer {name!r} of {path} has shape {known[name]}, not {shapes[name]}")
            missing = {name: shape for name, shape in shapes.items() if name not in known}
            if run is None or missing:
                document = self._run_document(recipe, run, known | shapes, missing, batch_size, provenance)
                fresh = Run(self, path, document)
                for layer in missing:
                    for key, make in fresh.array_documents(layer):
                        metadata.write(self.objects, key, make(fresh.n_images))
                put_group(self.objects, f"{path}/{layout.COMMITTED}", "committed-group", recipe)
                # The run's document comes after its arrays: a layer that it names can be written.
                metadata.write(self.objects, f"{path}/{layout.ROOT}", document)
            catalog.put_entry(self.objects, path, metadata.read(self.objects, f"{path}/{layout.ROOT}"))
            run = self.open_run(path)
        for layer in run.layers:
            run.mend(layer)
        return run

    def _run_document(
        self,
        recipe: Recipe,
        run: Run | None,
        layers: Mapping[str, layout.Shape],
        missing: Mapping[str, layout.Shape],
        batch_size: int,
        provenance: Mapping[str, Any],
    ) -> dict[str, Any]:
        itemsize = layout.DTYPES[recipe.precision].itemsize
        made_by = [*(run.provenance if run else ()), {**provenance, "layers": sorted(missing)}]
        document = layout.group_document(
            "run",
            {
                "recipe": recipe.to_json(),
                "fingerprint": recipe.fingerprint,
                "block_length": run.block_length if run else layout.block_length(layers.values(), itemsize),
                "batch_size": run.batch_size if run else batch_size,
                "provenance": made_by,
                "layers": {name: list(shape) for name, shape in layers.items()},
            },
        )
        try:
            normal: dict[str, Any] = json.loads(canonical_json(document))
        except (TypeError, ValueError) as error:
            raise BadRequestError(f"provenance is no plain JSON: {error}") from None
        return normal


def _checked_layers(layers: Mapping[str, layout.Shape]) -> dict[str, layout.Shape]:
    if not layers:
        raise BadRequestError("a run without layers; name at least one")
    try:
        return {layout.check_segment("layer", name): layout.check_shape(name, shape) for name, shape in layers.items()}
    except CorruptError as error:
        raise BadRequestError(str(error)) from None


def put_group(objects: Objects, path: str, kind: str, recipe: Recipe) -> None:
    """Make sure that there is a sound document at ``path`` for a group on the way to a run of ``recipe``."""
    key = f"{path}/{layout.ROOT}"
    attributes = {"model": {"model": recipe.model}, "technique": {"technique": recipe.technique}}.get(kind, {})
    try:
        metadata.read(objects, key)
    except (NotFoundError, CorruptError):
        metadata.write(objects, key, layout.group_document(kind, attributes))


def _differences(runs: Sequence[Run]) -> str:
    """Each run's fingerprint with the fields of its recipe in which the runs differ."""
    recipes = [run.recipe.to_json() for run in runs]
    fields = [field for field in recipes[0] if len({canonical_json(recipe[field]) for recipe in recipes}) > 1]
    return "; ".join(
        f"{run.fingerprint[:12]} ({', '.join(f'{f}={_short(recipe[f])}' for f in fields)})"
        for run, recipe in zip(runs, recipes, strict=True)
    )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else canonical_json(value).decode()
    return text if len(text) <= 60 else text[:57] + "..."


__all__ = ["Bucket", "LayerInfo", "StoredDataset", "read_samples"]

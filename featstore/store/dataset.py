"""A data set in a store: its sample table and the runs over it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
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
    unknown_name,
)
from featstore.recipe import Recipe, canonical_json
from featstore.store import basis, catalog, layout, leases, metadata
from featstore.store.basis import Basis, Reduced
from featstore.store.differences import told_apart
from featstore.store.meaning import Query
from featstore.store.objects import Objects
from featstore.store.precision import of
from featstore.store.provenance import Entry, joined
from featstore.store.run import LayerInfo, Run
from featstore.store.stored_samples import Rows, StoredSamples, rows_of

_log = logging.getLogger(__name__)

MAX_IMAGES = 1 << 40


def read_samples(objects: Objects, name: str) -> StoredSamples:
    """The sample table of data set ``name`` as it is in the store now; its parts are read when they are asked for.

    Raises:
        NotFoundError: if there is no such data set.
        CorruptError: if its document is damaged.
    """
    key = f"{layout.check_segment('data set', name)}/{layout.ROOT}"
    own = metadata.own(metadata.read(objects, key))
    if own.get("kind") != "dataset" or own.get("name") != name:
        raise CorruptError(f"{key} does not describe data set {name!r}", hint=metadata.remedy(key))
    count = own.get("images")
    if not isinstance(count, int) or not 0 <= count < MAX_IMAGES:
        raise CorruptError(f"{key} says {count!r} images; 0..{MAX_IMAGES - 1} are sound", hint=metadata.remedy(key))
    return StoredSamples(objects, name, count)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """The runs that a head amalgamates."""

    runs: tuple[Run, ...]
    """K runs: all timesteps of the first technique, then of the second, and so on."""


class StoredDataset:
    """A data set in a store, with the sample table as it was when this object was made."""

    def __init__(self, objects: Objects, name: str, samples: StoredSamples, *, writable: bool) -> None:
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

    def rows(self, keys: Sequence[str]) -> Rows:
        """Row of each of ``keys``, (n,) int64, -1 for those that the table lacks."""
        return rows_of(self.samples, keys)

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
        return self._one(self.runs(), technique, timestep, model, fingerprint)

    def _one(
        self, runs: Sequence[Run], technique: str, timestep: int | None, model: str | None, fingerprint: str | None
    ) -> Run:
        """The one of ``runs`` that fits; errors of `run`."""
        fitting = list(filter(_query(technique, timestep, model, fingerprint).fits, runs))
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
            f"{len(fitting)} runs of data set {self.name!r} have {asked}: {told_apart(fitting)}",
            hint="name the timestep and model, or the first digits of one fingerprint (--run on the command line)",
        )

    def bucket(
        self,
        techniques: Sequence[str],
        *,
        timesteps: Sequence[int] = (50,),
        model: str | None = None,
        fingerprints: Sequence[str] = (),
    ) -> Bucket:
        """The runs of all ``techniques`` at all ``timesteps``, technique by technique.

        Args:
            techniques: expressions as they were typed when extracting.
            timesteps: 0..999.
            model: name of the model; None if there is only one.
            fingerprints: the first digits of each run that has to be told apart from others that fit.

        Raises:
            NotCommittedError: if there is none for a technique and timestep; the message lists what there is.
            BadRequestError: if several fit, or if ``fingerprints`` name a run that does not.
        """
        there = self.runs()
        asked = [(technique, timestep) for technique in techniques for timestep in timesteps]
        fitting = [list(filter(_query(*pair, model, None).fits, there)) for pair in asked]
        known = {run.fingerprint for some in fitting for run in some}
        for digits in fingerprints:
            if known and not any(fingerprint.startswith(digits) for fingerprint in known):
                raise unknown_name("fingerprint", digits, {fingerprint[:12] for fingerprint in known})
        runs = []
        for pair, some in zip(asked, fitting, strict=True):
            named = {run.fingerprint for run in some if run.fingerprint.startswith(tuple(fingerprints))}
            runs.append(self._one(there, *pair, model, named.pop() if len(named) == 1 else None))
        return Bucket(runs=tuple(runs))

    def create_run(
        self,
        recipe: Recipe,
        layers: Mapping[str, layout.Shape],
        *,
        batch_size: int,
        provenance: Mapping[str, Any],
        bases: Mapping[str, Basis] | None = None,
        compress: bool = False,
    ) -> Run:
        """The run of ``recipe`` with at least ``layers``, created or completed where it is missing.

        A run that exists keeps its block length and batch size. Calling it again changes nothing,
        and mends array documents and catalog entries that are damaged.

        Args:
            recipe: what decides the bytes.
            layers: (C, H, W) by name.
            batch_size: images in every forward pass of the run.
            provenance: versions, who, when, on what; plain JSON, kept with the layers it made.
            bases: what channels of new layers are projected onto; where another has put a basis of this
                run meanwhile, that one counts (`Run.basis`).
            compress: whether maps of a new run lie behind zstd (`featstore.store.packing`).

        Raises:
            BadRequestError: for names or shapes that cannot be.
            IncompatibleError: for another recipe in the same place, or a layer of another shape.
            StorageError: if the disk fails or refuses.
        """

        def made_by(run: Run | None, missing: Sequence[str]) -> Sequence[Entry]:
            before = run.provenance if run else ()
            return [*before, {**provenance, "layers": missing}] if missing else before

        shapes = _checked_layers(layers)
        return self._put_run(
            recipe, shapes, batch_size=batch_size, made_by=made_by, bases=(bases or {}).get, compress=compress
        )

    def adopt(self, run: Run, layers: Sequence[str]) -> Run:
        """The run here that takes in features of ``run``, which is of another store: created or completed like it.

        A new run takes over its block length, batch size, compression and provenance; one that is here keeps its own,
        and its provenance is completed by who made what comes. Calling it again changes nothing.

        Args:
            run: of another store.
            layers: those of its layers that are to be here.

        Raises:
            CorruptError: if a basis of ``run`` is broken.
            IncompatibleError: as `create_run`, and if a layer was projected onto another basis here.
            StorageError: as `create_run`.
        """

        def made_by(here: Run | None, _: Sequence[str]) -> Sequence[Entry]:
            if here is None:
                return joined((), run.provenance, layers)
            # Rows of another batch shape agree to about 1e-3 only, so it is said with who made them.
            odd = {} if here.batch_size == run.batch_size else {"batch_size": run.batch_size}
            return joined(here.provenance, [{**entry, **odd} for entry in run.provenance], layers)

        here = self._put_run(
            run.recipe,
            {layer: run.layers[layer].shape for layer in layers},
            batch_size=run.batch_size,
            block_length=run.block_length,
            made_by=made_by,
            bases=run.basis,
            compress=run.compressed,
        )
        for layer in layers:
            if here.layers[layer].reduced != run.layers[layer].reduced:
                raise IncompatibleError(
                    f"{run.path}/{layer}: the two sides projected its channels onto different bases, so their features "
                    "cannot stand side by side",
                    hint="`featstore rm` one of the two runs",
                )
        return here

    def _put_run(
        self,
        recipe: Recipe,
        shapes: Mapping[str, layout.Shape],
        *,
        batch_size: int,
        block_length: int | None = None,
        made_by: Callable[[Run | None, Sequence[str]], Sequence[Entry]],
        bases: Callable[[str], Basis | None],
        compress: bool,
    ) -> Run:
        """What `create_run` and `adopt` have in common.

        Args:
            recipe: of the run.
            shapes: (C, H, W) of each layer that is to be there.
            batch_size: of a new run.
            block_length: of a new run; None: as its layers ask for.
            made_by: the provenance, given the run that is there and the names of layers that are new.
            bases: of a new layer; None where its channels are the model's own.
            compress: of a new run.
        """
        self.require_writable()
        if batch_size < 1:
            raise BadRequestError(f"batch size {batch_size} is not positive")
        path = layout.run_path(self.name, recipe.path)
        for folder, kind in ((path.rsplit("/", 2)[0], "model"), (path.rsplit("/", 1)[0], "technique")):
            put_group(self.objects, folder, kind, recipe)
        with leases.exclusive(self.objects, f"{path}/{layout.ROOT}"):
            run = self.find(recipe)
            known = {name: info.shape for name, info in run.layers.items()} if run else {}
            for name in shapes.keys() & known.keys():
                if shapes[name] != known[name]:
                    raise IncompatibleError(f"layer {name!r} of {path} has shape {known[name]}, not {shapes[name]}")
            missing = {name: shape for name, shape in shapes.items() if name not in known}
            entries = made_by(run, sorted(missing))
            if run is None or missing or list(entries) != list(run.provenance):
                fitted = {name: one for name in missing if (one := bases(name)) is not None}
                document = self._run_document(
                    recipe,
                    run,
                    {**known, **shapes},
                    provenance=entries,
                    reduced=self._keep_bases(path, recipe, missing, fitted),
                    batch_size=batch_size,
                    block_length=block_length,
                    compress=compress,
                )
                fresh = Run(self, path, document)
                for layer in missing:
                    for key, make in fresh.array_documents(layer):
                        metadata.write(self.objects, key, make(fresh.n_images))
                for folder, kind in groups_below(path, recipe):
                    put_group(self.objects, folder, kind, recipe)
                # The run's document comes after its arrays: a layer that it names can be written.
                metadata.write(self.objects, f"{path}/{layout.ROOT}", document)
            catalog.put_entry(self.objects, path, metadata.read(self.objects, f"{path}/{layout.ROOT}"))
            run = self.open_run(path)
        for layer in run.layers:
            run.mend(layer)
        return run

    def _keep_bases(
        self, path: str, recipe: Recipe, missing: Mapping[str, layout.Shape], bases: Mapping[str, Basis]
    ) -> dict[str, Reduced]:
        """Put the bases of new layers, and say what the run's document says of them."""
        for layer in bases.keys() & missing.keys():
            count, channels = bases[layer].components.shape
            if not count == missing[layer][0] == recipe.components < channels:
                raise BadRequestError(
                    f"layer {layer!r} of {missing[layer][0]} channels, a basis of {count} components of {channels} "
                    f"channels and a recipe of {recipe.components} components do not fit each other"
                )
        return {name: basis.keep(self.objects, path, name, bases[name]) for name in missing if name in bases}

    def _run_document(
        self,
        recipe: Recipe,
        run: Run | None,
        layers: Mapping[str, layout.Shape],
        *,
        provenance: Sequence[Entry],
        reduced: Mapping[str, Reduced],
        batch_size: int,
        block_length: int | None,
        compress: bool,
    ) -> dict[str, Any]:
        before = {name: info.reduced for name, info in run.layers.items() if info.reduced} if run else {}
        itemsize = layout.DTYPES[recipe.precision].itemsize
        length = block_length or layout.block_length(layers.values(), itemsize)
        document = layout.group_document(
            "run",
            {
                "recipe": recipe.to_json(),
                "fingerprint": recipe.fingerprint,
                "block_length": run.block_length if run else length,
                "batch_size": run.batch_size if run else batch_size,
                "compressed": run.compressed if run else compress,
                "provenance": list(provenance),
                "layers": {name: list(shape) for name, shape in layers.items()},
                "reduced": {name: dataclasses.asdict(one) for name, one in (before | dict(reduced)).items()},
            },
        )
        try:
            normal: dict[str, Any] = json.loads(canonical_json(document))
        except (TypeError, ValueError) as error:
            raise BadRequestError(f"provenance is no plain JSON: {error}") from None
        return normal


def _query(technique: str, timestep: int | None, model: str | None, fingerprint: str | None) -> Query:
    return Query(
        techniques=(technique,),
        timesteps=() if timestep is None else (timestep,),
        models=() if model is None else (model,),
        fingerprints=() if fingerprint is None else (fingerprint,),
    )


def _checked_layers(layers: Mapping[str, layout.Shape]) -> dict[str, layout.Shape]:
    if not layers:
        raise BadRequestError("a run without layers; name at least one")
    try:
        return {layout.check_segment("layer", name): layout.check_shape(name, shape) for name, shape in layers.items()}
    except CorruptError as error:
        raise BadRequestError(str(error)) from None


def groups_below(path: str, recipe: Recipe) -> list[tuple[str, str]]:
    """Paths of the groups in a run, each with its kind."""
    groups = [(layout.COMMITTED, True), (layout.SCALES, of(recipe.precision).scaled), (layout.REDUCE, recipe.reduce)]
    return [(f"{path}/{name}", f"{name}-group") for name, there in groups if there]


def put_group(objects: Objects, path: str, kind: str, recipe: Recipe) -> None:
    """Make sure that there is a sound document at ``path`` for a group on the way to a run of ``recipe``."""
    key = f"{path}/{layout.ROOT}"
    try:
        metadata.read(objects, key)
    except (NotFoundError, CorruptError):
        metadata.write(objects, key, layout.group_document(kind, group_attributes(kind, recipe)))


def group_attributes(kind: str, recipe: Recipe) -> dict[str, Any]:
    """What a group on the way to a run of ``recipe`` says."""
    return {"model": {"model": recipe.model}, "technique": {"technique": recipe.technique}}.get(kind, {})


__all__ = ["Bucket", "LayerInfo", "StoredDataset", "read_samples"]

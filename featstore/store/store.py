"""A store: opening it, its data sets, and their sample tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featstore.errors import BadRequestError, CorruptError, NotFoundError, StorageError
from featstore.store import cached, catalog, layout, leases, metadata
from featstore.store.dataset import StoredDataset, read_samples
from featstore.store.meaning import Query
from featstore.store.objects import Objects
from featstore.store.run import Run
from featstore.store.samples import SampleTable
from featstore.store.stored_samples import StoredSamples, merged, write_table
from featstore.store.urls import objects_at

_REMEDY = "create a store with `featstore extract`, or name another with --store"


class Store:
    """Features of many data sets, shared; `featstore.open` and `featstore.create` make one."""

    def __init__(self, url: str | Path, objects: Objects, *, writable: bool) -> None:
        self.url = str(url)
        self.objects = objects
        self.writable = writable

    def __repr__(self) -> str:
        return f"<Store {self.url!r} opened for {'writing' if self.writable else 'reading'}>"

    def datasets(self) -> list[str]:
        """Names of the data sets, sorted."""
        return catalog.datasets(self.objects)

    def dataset(self, name: str) -> StoredDataset:
        """The data set ``name``.

        Raises:
            NotFoundError: if there is none; the message names those that exist.
            CorruptError: if its sample table is damaged.
        """
        try:
            samples = read_samples(self.objects, name)
        except NotFoundError:
            there = ", ".join(self.datasets()) or "none yet"
            raise NotFoundError(
                f"store {self.url!r} has no data set {name!r}; there are: {there}",
                hint=f"featstore extract --dataset {name} --techniques basic",
            ) from None
        return StoredDataset(self.objects, name, samples, writable=self.writable)

    def find(
        self,
        *,
        dataset: str | None = None,
        technique: str | None = None,
        model: str | None = None,
        timestep: int | None = None,
        layers: Sequence[str] = (),
        fingerprint: str | None = None,
        **values: Any,
    ) -> list[Run]:
        """The runs that fit, data set by data set, each ordered by path; None excludes nothing.

        Args:
            dataset: name of the only data set to look in.
            technique: the expression as it was typed when extracting, e.g. ``controlnet``.
            model: name of the model.
            timestep: 0..999.
            layers: names of layers that a run must have.
            fingerprint: its first digits.
            values: other values of the recipe, e.g. ``precision="float16"``, ``seed=3`` or ``prompt="a horse"``;
                `featstore.store.differences.leaves` has the names.

        Raises:
            NotFoundError: if there is no such data set.
            BadRequestError: for a name or value that no run there has: the message lists those that they have.
                (Values that only never meet in one run give an empty list.)
        """
        query = Query(
            techniques=() if technique is None else (technique,),
            models=() if model is None else (model,),
            timesteps=() if timestep is None else (timestep,),
            layers=tuple(layers),
            fingerprints=() if fingerprint is None else (fingerprint,),
            fields=values,
        )
        names = self.datasets() if dataset is None else [dataset]
        return query.select([run for name in names for run in self.dataset(name).runs()])

    def put_samples(self, name: str, table: SampleTable, *, source: str) -> StoredDataset:
        """Create the data set ``name`` or bring its sample table up to date; rows never move.

        Known keys keep their row and take the new digest (their rows become stale) and split, new
        keys are appended, and keys that ``table`` lacks stay. Arrays of all runs grow with it.

        Args:
            name: letters, digits, ".", "_" and "-".
            table: the images.
            source: where they come from, a sentence.

        Raises:
            BadRequestError: for a name that cannot be, or a table that shares no key with the one
                there: that is another data set of the same name.
            StorageError: if the disk fails or refuses.
        """
        layout.check_segment("data set", name)
        self.require_writable()
        key = f"{name}/{layout.ROOT}"
        with leases.exclusive(self.objects, key):
            try:
                old = read_samples(self.objects, name)
            except NotFoundError:
                old = None
            if old is not None and len(old) and set(old.keys).isdisjoint(table.keys):
                raise BadRequestError(
                    f"store {self.url!r} has another data set {name!r}: of its {len(old)} images "
                    f"({old.keys[0]!r}, ..) none is among these {len(table)}",
                    hint="use another --store, or another name for this data set",
                )
            now = table if old is None else merged(old, table)
            write_table(self.objects, name, now, old)
            samples = StoredSamples(self.objects, name, len(now), now)
            dataset = StoredDataset(self.objects, name, samples, writable=True)
            if old is not None and len(now) > len(old):
                # Arrays may be longer than the table, but never shorter: other readers go by them.
                for run in dataset.runs():
                    for layer in run.layers:
                        run.mend(layer)
            if old is None or len(now) > len(old):
                # After its parts: rows that it counts are there.
                document = layout.group_document("dataset", {"name": name, "source": source, "images": len(now)})
                metadata.write(self.objects, key, document)
            else:
                document = metadata.read(self.objects, key)
            catalog.put_entry(self.objects, name, document)
        return dataset

    def require_writable(self) -> None:
        """Raise StorageError if the store was opened for reading."""
        if not self.writable:
            raise StorageError(f"{self.url!r} was opened for reading only", hint="open it with featstore.create(url)")

    def finish(self, runs: Sequence[Run] = ()) -> None:
        """After an extraction: put ``catalog.json``, for readers that cannot list, and which blocks are complete.

        From now on a power cut takes nothing of ``runs`` any more.

        Args:
            runs: those that were written.
        """
        self.require_writable()
        for run in runs:
            run.note_complete()
        catalog.write_snapshot(self)


def _check_root(url: str | Path, objects: Objects) -> None:
    try:
        document: dict[str, Any] = metadata.read(objects, layout.ROOT)
    except NotFoundError:
        if not objects.can_list or layout.CATALOG not in objects.names(""):
            raise
        raise CorruptError(f"{layout.ROOT} of store {str(url)!r} is gone", hint=metadata.remedy(layout.ROOT)) from None
    if metadata.own(document).get("kind") != "store":
        raise CorruptError(f"{str(url)!r} is not the root of a store", hint="name the folder above it")


def open(url: str | Path, *, cache: str | Path | None = None, cache_bytes: int = cached.DEFAULT_BYTES) -> Store:
    """The store at ``url``, for reading; nothing is ever written through it.

    Args:
        url: a path, or a URL: ``file://``, ``s3://bucket/path``, ``gs://bucket/path``, ``az://container/path``,
            ``http(s)://host/path`` or ``memory://name``. Credentials come from the environment (docs/remote.md).
        cache: folder of a cache through which a remote store is read; None: every read asks the remote. Processes
            and stores may share one. A local store is read as it is.
        cache_bytes: bytes that the cache never exceeds; what was used longest ago makes room.

    Raises:
        NotFoundError: if there is no store.
        BadRequestError: for a scheme that is not supported, or a cache that cannot be.
        StorageError: if a remote place is out of reach, refuses, or lacks credentials.
        IncompatibleError: for a store of a newer format.
        CorruptError: if its ``zarr.json`` is damaged.
    """
    objects = objects_at(url)
    if cache is not None:
        objects = cached.through_cache(objects, Path(cache), cache_bytes)
    try:
        _check_root(url, objects)
    except NotFoundError:
        raise NotFoundError(f"there is no store at {str(url)!r}", hint=_REMEDY) from None
    except StorageError as error:
        error.exit_code = 2  # Nothing was started, as in `create`.
        raise
    return Store(url, objects, writable=False)


def create(url: str | Path) -> Store:
    """The store at ``url``, for writing; created if there is none. See `open` for what ``url`` can be.

    What killed writers left unfinished is removed on the way (see `featstore.store.partial`).

    Raises:
        BadRequestError: for a scheme that is not supported, or a folder with other things in it.
        StorageError: if it cannot be written, as over HTTP.
        IncompatibleError, CorruptError: as `open`.
    """
    objects = objects_at(url)
    try:
        _prepare(url, objects)
    except StorageError as error:
        error.exit_code = 2  # Nothing was started: to the command line, this is a request for an impossible place.
        raise
    return Store(url, objects, writable=True)


def _prepare(url: str | Path, objects: Objects) -> None:
    if objects.read_only:
        objects.require_writable()
    try:
        _check_root(url, objects)
    except NotFoundError:
        strangers = [name for name in objects.names("") if name != layout.ROOT]
        if strangers:
            raise BadRequestError(
                f"{str(url)!r} is no store, but a folder with other things in it ({strangers[0]!r}, ..)",
                hint="name a new or empty folder with --store",
            ) from None
        objects.put_new(layout.ROOT, metadata.seal(layout.group_document("store", {"made_by": "featstore"})))
        _check_root(url, objects)
    objects.require_writable()
    with objects.lock(layout.ROOT):
        objects.sweep()

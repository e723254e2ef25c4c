"""A store: opening it, its data sets, and their sample tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featstore.errors import BadRequestError, CorruptError, NotFoundError, StorageError
from featstore.store import catalog, layout, metadata
from featstore.store.dataset import StoredDataset, read_samples
from featstore.store.objects import Objects
from featstore.store.samples import SampleTable
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
        names = self.objects.names("")
        return [name for name in names if layout.is_segment(name) and self.objects.exists(f"{name}/{layout.ROOT}")]

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
        with self.objects.lock(key):
            try:
                old = read_samples(self.objects, name)
            except NotFoundError:
                old = None
            if old is not None and len(old) and not set(old.keys) & set(table.keys):
                raise BadRequestError(
                    f"store {self.url!r} has another data set {name!r}: of its {len(old)} images "
                    f"({old.keys[0]!r}, ..) none is among these {len(table)}",
                    hint="use another --store, or another name for this data set",
                )
            merged = old.merged(table) if old is not None else table
            document = layout.group_document(
                "dataset", {"name": name, "source": source, "samples": merged.to_json(), "images": len(merged)}
            )
            if merged != old:
                metadata.write(self.objects, key, document)
            else:
                document = metadata.read(self.objects, key)
            catalog.put_entry(self.objects, name, document)
        dataset = StoredDataset(self.objects, name, merged, writable=True)
        if old is not None and len(merged) > len(old):
            for run in dataset.runs():
                for layer in run.layers:
                    run.mend(layer)
        return dataset

    def require_writable(self) -> None:
        """Raise StorageError if the store was opened for reading."""
        if not self.writable:
            raise StorageError(f"{self.url!r} was opened for reading only", hint="open it with featstore.create(url)")

    def finish(self) -> None:
        """Put ``catalog.json``, the snapshot for readers that cannot list; after an extraction."""
        self.require_writable()
        catalog.write_snapshot(self)


def _check_root(url: str | Path, objects: Objects) -> None:
    try:
        document: dict[str, Any] = metadata.read(objects, layout.ROOT)
    except NotFoundError:
        if layout.CATALOG not in objects.names(""):
            raise
        raise CorruptError(f"{layout.ROOT} of store {str(url)!r} is gone", hint=metadata.remedy(layout.ROOT)) from None
    if metadata.own(document).get("kind") != "store":
        raise CorruptError(f"{str(url)!r} is not the root of a store", hint="name the folder above it")


def open(url: str | Path) -> Store:
    """The store at ``url``, for reading; nothing is ever written through it.

    Args:
        url: a path or ``file://`` URL.

    Raises:
        NotFoundError: if there is no store.
        BadRequestError: for a scheme that is not supported.
        IncompatibleError: for a store of a newer format.
        CorruptError: if its ``zarr.json`` is damaged.
    """
    objects = objects_at(url)
    try:
        _check_root(url, objects)
    except NotFoundError:
        raise NotFoundError(f"there is no store at {str(url)!r}", hint=_REMEDY) from None
    return Store(url, objects, writable=False)


def create(url: str | Path) -> Store:
    """The store at ``url``, for writing; created if there is none.

    What killed writers left unfinished is removed on the way (see `featstore.store.partial`).

    Raises:
        BadRequestError: for a scheme that is not supported, or a folder with other things in it.
        StorageError: if it cannot be written.
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

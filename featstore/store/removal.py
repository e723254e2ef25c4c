"""Removing runs and data sets: whatever is cut off where, nothing that is left looks whole.

A run goes in this order, each step durable before the next:

1. Its note of complete blocks: from now on readers look at the records.
2. Its records: nothing is committed any more, and every read is refused.
3. All else but its document: shards, scales, bases, array documents.
4. Its entry in the catalog and what ``catalog.json`` says of it: it is listed no more.
5. Its document.

So a removal that was cut off leaves a run that holds less and says so; removing it again finishes it. Records go
before the document, as a run of the same recipe that is created later must not find any of them.

Of a data set, its runs go first, then its own document, then the sample table and its copies in the catalog.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator

from featstore.errors import BusyError, CorruptError, IncompatibleError, NotFoundError
from featstore.store import catalog, completeness, layout, leases, metadata
from featstore.store.dataset import StoredDataset
from featstore.store.objects import Objects
from featstore.store.parallel import each
from featstore.store.run import Run
from featstore.store.store import Store

_DEPTH = 3
"""Levels of a run's path below its data set."""
_OBJECT = re.compile(r"zarr\.json|c(\.\d+)+")

Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Doomed:
    """A run that is there, whole or not."""

    path: str
    run: Run | None
    """None: its document is damaged or of another version."""


def runs_of(store: Store, name: str) -> list[Doomed]:
    """Every run of a data set, also what a removal or a damage has left of one.

    Args:
        store: the store.
        name: of the data set, which may itself be half removed.

    Raises:
        StorageError: if the disk or the other side fails.
    """
    try:
        dataset: StoredDataset | None = store.dataset(name)
    except (NotFoundError, CorruptError):
        dataset = None
    paths = sorted({*catalog.paths(store.objects, name), *_walk(store.objects, name)})
    return [Doomed(path=path, run=_open(dataset, path)) for path in paths]


def _open(dataset: StoredDataset | None, path: str) -> Run | None:
    if dataset is None:
        return None
    try:
        return dataset.open_run(path)
    except (CorruptError, IncompatibleError):
        return None


def _walk(objects: Objects, name: str) -> list[str]:
    """Paths of runs by looking into folders, for those that the catalog names no more."""
    paths = [name]
    for _ in range(_DEPTH):
        paths = [f"{path}/{level}" for path in paths for level in objects.names(path) if layout.is_segment(level)]
    return [path for path in paths if objects.names(path)]


def keys_of(objects: Objects, path: str) -> list[str]:
    """Keys of all objects below ``path``."""
    return list(_below(objects, path))


def _below(objects: Objects, folder: str) -> Iterator[str]:
    for name in objects.names(folder):
        key = f"{folder}/{name}"
        if _OBJECT.fullmatch(name):
            yield key
            continue
        inside = list(_below(objects, key))
        if inside:
            yield from inside
        elif objects.exists(key):
            yield key


def require_idle(objects: Objects, paths: Iterable[str]) -> None:
    """Make sure that nobody is writing the runs at ``paths``.

    Raises:
        BusyError: if somebody is.
    """
    for path in paths:
        holders = leases.held(objects, path)
        if holders:
            who = ", ".join(dict.fromkeys(map(str, holders)))
            raise BusyError(
                f"{path} is being written by {who}",
                hint="wait until that has ended, or end it; what a killed process held is free after two minutes",
            )


def remove_runs(store: Store, doomed: Iterable[Doomed], advance: Advance) -> None:
    """Remove runs, in the order that the module's description gives.

    Args:
        store: opened for writing.
        doomed: of `runs_of`.
        advance: told of objects that are gone.

    Raises:
        BusyError: if one of them is being written; nothing is removed then.
        StorageError: if the store was opened for reading only, or the disk or the other side fails.
    """
    store.require_writable()
    doomed = list(doomed)
    require_idle(store.objects, (one.path for one in doomed))
    for one in doomed:
        _remove_run(store, one.path, advance)


def _remove_run(store: Store, path: str, advance: Advance) -> None:
    objects, document = store.objects, f"{path}/{layout.ROOT}"
    completeness.clear(objects, path)
    keys = keys_of(objects, path)
    records = [key for key in keys if key.startswith(f"{path}/{layout.COMMITTED}/")]
    _delete(objects, records, advance)
    _delete(objects, [key for key in keys if key not in {*records, document}], advance)
    _delete(objects, [layout.catalog_key(path), *_copies(objects, path)], advance)
    catalog.forget(objects, path)
    # Only now the mark: until the records are gone, it tells a snapshot of complete blocks from a true one.
    objects.delete(completeness.mark_key(path))
    _delete(objects, [document], advance)
    objects.prune(path)
    _remove_groups(objects, path)


def remove_dataset(store: Store, name: str, advance: Advance) -> None:
    """Remove a data set with all its runs; arguments and errors as `remove_runs`.

    Raises:
        NotFoundError: if there is nothing of it.
    """
    store.require_writable()
    objects = store.objects
    layout.check_segment("data set", name)
    if not objects.names(name):
        store.dataset(name)
    remove_runs(store, runs_of(store, name), advance)
    _delete(objects, [f"{name}/{layout.ROOT}"], advance)
    catalog.forget(objects, name)
    _delete(objects, [layout.catalog_key(name), *_copies(objects, name)], advance)
    _delete(objects, keys_of(objects, name), advance)
    objects.prune(name)


def _delete(objects: Objects, keys: list[str], advance: Advance) -> None:
    """Delete objects; all of them are gone for good when it returns."""

    def delete(key: str) -> None:
        objects.delete(key, durable=False)
        advance(1)

    each(objects, delete, keys)
    for folder in dict.fromkeys(key.rpartition("/")[0] for key in keys):
        objects.settle(folder)


def _copies(objects: Objects, path: str) -> list[str]:
    """Keys of the copies in the catalog of what belongs to the run or data set at ``path``."""
    start = path.replace("/", "~") + "~"
    return [f"{layout.CATALOG}/{name}" for name in objects.names(layout.CATALOG) if name.startswith(start)]


def _remove_groups(objects: Objects, path: str) -> None:
    """Remove the groups of technique and model above a run that is gone, where nothing else is in them."""
    for folder in (path.rpartition("/")[0], path.rpartition("/")[0].rpartition("/")[0]):
        key = f"{folder}/{layout.ROOT}"
        if objects.names(folder) != [layout.ROOT]:
            return
        data = objects.get(key, max_bytes=metadata.MAX_BYTES)
        objects.delete(key)
        # Somebody who creates a run here meanwhile has found the document there.
        if objects.names(folder):
            objects.put(key, data)
            return
        objects.prune(folder)

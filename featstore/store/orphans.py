"""Files that no document names: left by a removal that was cut off, by hand, or by other programs. No damage."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from featstore.store import basis, completeness, layout, stored_samples
from featstore.store.dataset import groups_below
from featstore.store.objects import Objects
from featstore.store.run import Run
from featstore.store.stored_samples import COLUMNS

_MAX_NAMED = 100

Known = Callable[[str], bool]
"""Whether a name is one that belongs in a folder."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What is known of a data set."""

    name: str
    paths: Sequence[str] = ()
    """Of all of its runs."""
    runs: Sequence[Run] = ()
    """Those of which it is known what belongs to them."""
    n_images: int | None = None
    """N; None where its table is damaged, so that nothing can be said of what lies below it."""


def orphans(objects: Objects, checked: Sequence[Checked], *, everywhere: bool) -> list[str]:
    """What lies in a store and belongs to nothing in it, a hundred at most; a folder is named as a whole.

    Args:
        objects: where the store lies; it can be listed.
        checked: data sets.
        everywhere: whether these are all there are; else only their own folders are looked at.
    """
    folders: list[Iterator[str]] = [_of_dataset(objects, one) for one in checked if one.n_images is not None]
    if everywhere:
        top = {layout.ROOT, layout.CATALOG_FILE, layout.CATALOG, *(one.name for one in checked)}
        folders += [_strangers(objects, "", top.__contains__), _of_catalog(objects, checked)]
    found = list(itertools.islice(itertools.chain(*folders), _MAX_NAMED + 1))
    more = [f"and more than these {_MAX_NAMED}"] if len(found) > _MAX_NAMED else []
    return [f"{key}: no document names it; nothing reads it" for key in found[:_MAX_NAMED]] + more


def _strangers(objects: Objects, folder: str, known: Known) -> Iterator[str]:
    for name in objects.names(folder):
        if not known(name):
            yield f"{folder}/{name}" if folder else name


def _of_catalog(objects: Objects, checked: Sequence[Checked]) -> Iterator[str]:
    known: set[str] = set()
    unclear: list[str] = []
    for one in checked:
        for path in (one.name, *one.paths):
            known |= {layout.catalog_key(path), completeness.snapshot_key(path), completeness.mark_key(path)}
        known |= {basis.copy_key(run.path, layer) for run in one.runs for layer in run.layers}
        opened = {run.path for run in one.runs}
        unclear += [basis.copy_key(path, "") for path in one.paths if path not in opened]
        if one.n_images is None:
            unclear.append(f"{layout.CATALOG}/{one.name}~")
        else:
            numbers = range(stored_samples.parts_of(one.n_images))
            known |= {stored_samples.copy_key(one.name, column, number) for column in COLUMNS for number in numbers}

    def belongs(name: str) -> bool:
        key = f"{layout.CATALOG}/{name}"
        return key in known or key.startswith(tuple(unclear))

    return _strangers(objects, layout.CATALOG, belongs)


def _of_dataset(objects: Objects, one: Checked) -> Iterator[str]:
    assert one.n_images is not None
    parts = stored_samples.parts_of(one.n_images)
    table = f"{one.name}/{layout.SAMPLES}"
    yield from _strangers(objects, table, {layout.ROOT, *COLUMNS}.__contains__)
    for column in COLUMNS:
        end = ".0" if column == "digest" else ""
        yield from _strangers(objects, f"{table}/{column}", _array(parts, end))
    levels = [path.split("/") for path in one.paths]
    for depth in range(1, 4):
        for folder in sorted({"/".join(level[:depth]) for level in levels} | ({one.name} if depth == 1 else set())):
            inside = {level[depth] for level in levels if "/".join(level[:depth]) == folder}
            own = {layout.ROOT, layout.SAMPLES} if depth == 1 else {layout.ROOT}
            yield from _strangers(objects, folder, (own | inside).__contains__)
    for run in one.runs:
        yield from _of_run(objects, run)


def _of_run(objects: Objects, run: Run) -> Iterator[str]:
    groups = [path.rpartition("/")[2] for path, _ in groups_below(run.path, run.recipe)]
    yield from _strangers(objects, run.path, {layout.ROOT, *groups, *run.layers}.__contains__)
    reduced = {layer for layer, info in run.layers.items() if info.reduced is not None}
    inside = {
        layout.COMMITTED: (set(run.layers), run.n_blocks, ""),
        layout.SCALES: (set(run.layers), run.n_blocks, ".0"),
        layout.REDUCE: (reduced, 1, ".0"),
    }
    for layer in run.layers:
        yield from _strangers(objects, f"{run.path}/{layer}", _array(run.n_blocks, ".0.0.0"))
    for group in groups:
        layers, chunks, end = inside[group]
        yield from _strangers(objects, f"{run.path}/{group}", (layers | {layout.ROOT}).__contains__)
        for layer in sorted(layers):
            yield from _strangers(objects, f"{run.path}/{group}/{layer}", _array(chunks, end))


def _array(chunks: int, end: str) -> Known:
    """The names in the folder of an array of so many chunks along its first axis; ``end`` stands for the others."""
    chunk = re.compile(rf"c\.(0|[1-9][0-9]*){re.escape(end)}")

    def belongs(name: str) -> bool:
        match = chunk.fullmatch(name)
        return name == layout.ROOT or (match is not None and len(match[1]) < 20 and int(match[1]) < chunks)

    return belongs

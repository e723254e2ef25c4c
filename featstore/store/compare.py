"""What one store lacks of what another holds, image by image and layer by layer.

Two stores may hold the images of a data set in different places, so everything here goes by keys. An image counts
as the same where its digest is: of an image that differs between the two, the target's own is kept, and no features
of the other are brought, unless the caller wants the target's table to follow the source's.

Shapes: N images of the source's sample table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError, CorruptError, FeatstoreError
from featstore.store.committed import Record, as_records, read_record
from featstore.store.dataset import StoredDataset
from featstore.store.parallel import each
from featstore.store.read import Rows
from featstore.store.run import Run
from featstore.store.samples import SampleTable

Mask = npt.NDArray[np.bool_]
"""(N,) rows of the source."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerLack:
    """One layer of a run."""

    there: Mask
    """What the source has of the images as the target knows, or will know, them."""
    todo: Mask
    """What of that the target lacks."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunLack:
    """One run of the source."""

    run: Run
    layers: Mapping[str, LayerLack]
    damaged: tuple[str, ...] = ()
    """What of the source's is damaged so that it cannot be compared, and what cannot be brought together."""

    def blocks(self) -> tuple[int, int]:
        """Blocks of the source of which something is lacking and of which nothing is, each counted once a layer."""
        todo = sum(self._blocks(lack.todo) for lack in self.layers.values())
        return todo, sum(self._blocks(lack.there) for lack in self.layers.values()) - todo

    def _blocks(self, mask: Mask) -> int:
        return len(np.unique(np.flatnonzero(mask) // self.run.block_length))

    @property
    def images(self) -> int:
        """Images of which at least one layer is lacking."""
        some = np.zeros(self.run.n_images, dtype=np.bool_)
        for lack in self.layers.values():
            some |= lack.todo
        return int(some.sum())

    @property
    def bytes_todo(self) -> int:
        """Bytes of the features that are lacking."""
        return sum(self.run.layers[name].stored_bytes * int(lack.todo.sum()) for name, lack in self.layers.items())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DatasetLack:
    """One data set of the source."""

    source: StoredDataset
    table: SampleTable
    """What the target's sample table is to take in."""
    new_images: int
    """Images that the target's table lacks."""
    differing: tuple[str, ...]
    """Keys of images that are not the same on both sides."""
    wanted: Record
    """(N,) digest of each image as the target knows, or will know, it."""
    runs: tuple[RunLack, ...]


def compare(
    source: StoredDataset,
    target: StoredDataset | None,
    runs: Sequence[Run],
    *,
    layers: Sequence[str] = (),
    update_images: bool = False,
) -> DatasetLack:
    """Find out what ``target`` lacks of ``runs``.

    Args:
        source: a data set.
        target: the data set of the same name in the other store; None: it has none.
        runs: runs of ``source``.
        layers: only these layers; empty: all.
        update_images: of an image that differs, take the source's: the target's features of it become stale.

    Raises:
        BadRequestError: if the two are different data sets of the same name.
    """
    keys, digests = source.samples.keys, source.samples.digest_bytes(0, len(source.samples))
    rows = np.full(len(keys), -1) if target is None else target.rows(keys)
    known = rows >= 0
    if target is not None and len(target.samples) and len(keys) and not known.any():
        raise BadRequestError(
            f"{target.objects.url!r} has another data set {source.name!r}: it has none of the {len(keys)} images "
            f"({keys[0]!r}, ..) of the one in {source.objects.url!r}",
            hint="push and pull bring features of the same images together; use another store for the other data set",
        )
    differing = np.zeros(len(keys), dtype=np.bool_)
    if target is not None and known.any():
        theirs = target.samples.digest_bytes(0, len(target.samples))[rows[known]]
        differing[known] = (theirs != digests[known]).any(axis=1)
        if not update_images:
            digests = digests.copy()
            digests[known] = theirs
    wanted = as_records(digests)
    taken = ~known | (differing if update_images else False)
    return DatasetLack(
        source=source,
        table=_table(source, target, taken, rows),
        new_images=int((~known).sum()),
        differing=tuple(keys[row] for row in np.flatnonzero(differing)),
        wanted=wanted,
        runs=tuple(_compare_run(run, target, rows, wanted, layers) for run in runs),
    )


def _table(source: StoredDataset, target: StoredDataset | None, taken: Mask, rows: Rows) -> SampleTable:
    """The images of the source in ``taken``, and one as the target has it, which tells that it is the same data set."""
    entries = [(source.samples, row) for row in np.flatnonzero(taken).tolist()]
    if target is not None:
        entries[:0] = [(target.samples, row) for row in rows[(rows >= 0) & ~taken][:1].tolist()]
    return SampleTable(
        keys=tuple(samples.keys[row] for samples, row in entries),
        digests=tuple(samples.digests[row] for samples, row in entries),
        splits=tuple(samples.splits[row] for samples, row in entries),
    )


def _compare_run(run: Run, target: StoredDataset | None, rows: Rows, wanted: Record, layers: Sequence[str]) -> RunLack:
    there = target.find(run.recipe) if target is not None else None
    lacks, damaged = {}, []
    for layer in run.layers:
        if layers and layer not in layers:
            continue
        try:
            run.reader(layer)
        except CorruptError as error:
            damaged.append(in_words(error))
            continue
        have, broken = held(run, layer, np.arange(run.n_images), wanted)
        damaged += broken
        todo = have.copy()
        if there is not None and layer in there.layers:
            if run.layers[layer].reduced != there.layers[layer].reduced:
                damaged.append(
                    f"{run.path}/{layer}: the two sides projected its channels onto different bases, so their features "
                    "cannot stand side by side; `featstore rm` one of the two runs"
                )
                continue
            # What is broken over there counts as lacking; writing it says what is wrong.
            todo &= ~held(there, layer, rows, wanted)[0]
        lacks[layer] = LayerLack(there=have, todo=todo)
    return RunLack(run=run, layers=lacks, damaged=tuple(damaged))


def in_words(error: FeatstoreError) -> str:
    """What is wrong, and what to do about it."""
    return f"{error}; {error.hint}" if error.hint else str(error)


def held(run: Run, layer: str, rows: Rows, wanted: Record) -> tuple[npt.NDArray[np.bool_], list[str]]:
    """Which of n images a layer has, computed from what is wanted; and what is broken and so does not count.

    Blocks that are known to be complete are not looked at (`featstore.store.completeness`).

    Args:
        run: the run.
        layer: name of the layer.
        rows: (n,) row of each image, -1 where the table lacks it.
        wanted: (n,) digest of each image; the table may have another one.
    """
    own = np.append(as_records(run.dataset.samples.digest_bytes(0, run.n_images)), np.uint64(0))[rows]
    try:
        found = np.append(run.valid([layer]), False)[rows] & (own == wanted)
        # Of an image that has changed since, the features of before may still be there.
        blocks = np.unique(rows[(rows >= 0) & (own != wanted)] // run.block_length).tolist()
    except CorruptError:
        found, blocks = np.zeros(len(rows), dtype=np.bool_), list(range(run.n_blocks))
    record, broken = np.zeros(run.n_blocks * run.block_length + 1, dtype=np.uint64), []

    def read(block: int) -> None:
        try:
            part = read_record(run.dataset.objects, run.path, layer, block, run.block_length)
        except CorruptError as error:
            broken.append(in_words(error))
        else:
            record[block * run.block_length :][: run.block_length] = part

    each(run.dataset.objects, read, blocks)
    # The last one stands for -1; 0 is never wanted.
    return found | (record[rows] == wanted), broken

"""Copying between two stores, wherever they lie, what one lacks of the other: ``push`` and ``pull``.

A row is read with its checksum checked and written as an extraction writes it: shard first, then the record, the
rows that the block has already byte for byte as they are. So whatever is cut off where, both stores tell the truth,
and the same call again goes on from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from featstore.store import layout, metadata
from featstore.store.compare import DatasetLack, RunLack, compare, held
from featstore.store.copying import Advance, RunCopy, copy_all, pieces_of
from featstore.store.dataset import StoredDataset
from featstore.store.digest import Column, column, digest
from featstore.store.leases import Keeper
from featstore.store.meaning import Query
from featstore.store.run import Run
from featstore.store.store import Store

_LOCAL_BLOCKS = 2
_REMOTE_BLOCKS = 8
"""Blocks under way at once: on disks one is read while another is written, elsewhere requests overlap."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransferPlan:
    """What is to be copied."""

    source: Store
    datasets: tuple[DatasetLack, ...]

    @property
    def runs(self) -> list[RunLack]:
        """Of all data sets."""
        return [run for dataset in self.datasets for run in dataset.runs]

    @property
    def bytes_todo(self) -> int:
        """Bytes of features to copy."""
        return sum(run.bytes_todo for run in self.runs)


def plan_transfer(
    source: Store,
    target: Store | None,
    *,
    dataset: str | None = None,
    query: Query | None = None,
    update_images: bool = False,
) -> TransferPlan:
    """Find out what the store ``target`` lacks of ``source``; nothing is written.

    Args:
        source: where to copy from.
        target: where to copy to; None: there is nothing yet.
        dataset: only this data set.
        query: only these runs and layers.
        update_images: of images that differ, take the source's (see `compare`).

    Raises:
        NotFoundError: if the source has no such data set.
        BadRequestError: for a query that nothing fits, or different data sets of the same name.
        CorruptError: if a document of either is damaged.
    """
    query = query or Query()
    opened = [source.dataset(name) for name in (source.datasets() if dataset is None else [dataset])]
    runs = {one.name: one.runs() for one in opened}
    chosen = {run.path for run in query.select([run for some in runs.values() for run in some])}
    there = target.datasets() if target is not None else []
    lacks = []
    for one in opened:
        some = [run for run in runs[one.name] if run.path in chosen]
        if some:
            other = target.dataset(one.name) if target is not None and one.name in there else None
            lacks.append(compare(one, other, some, layers=query.layers, update_images=update_images))
    return TransferPlan(source=source, datasets=tuple(lacks))


def transfer(plan: TransferPlan, target: Store, advance: Advance) -> list[RunCopy]:
    """Copy what ``plan`` found lacking.

    Blocks that are damaged on either side are not copied, and named; all others are.

    Args:
        plan: of the same two stores.
        target: opened for writing.
        advance: told of bytes that are done with.

    Raises:
        IncompatibleError: if the target has another recipe or shape in the same place.
        StorageError: if either side fails; what was committed stays.
    """
    remote = max(plan.source.objects.parallel_reads, target.objects.parallel_reads) > 1
    count = _REMOTE_BLOCKS if remote else _LOCAL_BLOCKS
    copies: list[RunCopy] = []
    written: list[Run] = []
    with Keeper() as keeper:
        for lack in plan.datasets:
            stored = _bring_table(lack, target)
            here = [RunCopy(lack=run, problems=list(run.damaged)) for run in lack.runs]
            copies += here
            pieces = (piece for copy in here for piece in pieces_of(copy, stored, lack))
            copy_all(pieces, keeper, count, advance)
            # Also of runs that lacked nothing: whoever copied them may have been killed just before this.
            written += [run for run in (stored.find(copy.lack.run.recipe) for copy in here) if run is not None]
    target.finish(written)
    return copies


def compare_digests(plan: TransferPlan, target: Store, copies: Sequence[RunCopy], advance: Advance) -> None:
    """Fill in the digests of ``copies``: what either side holds of all that the source has.

    Args:
        plan: of the same two stores.
        target: as it is now.
        copies: of `transfer` with ``plan``.
        advance: told of each layer of a run that is done, on each side.

    Raises:
        StorageError: if either side fails.
    """
    of_run = {copy.lack.run.path: copy for copy in copies}
    for lack in plan.datasets:
        other = target.dataset(lack.source.name)
        places = other.rows(lack.source.samples.keys)
        for one in lack.runs:
            run, there = one.run, other.find(one.run.recipe)
            ours: dict[str, Column] = {}
            theirs: dict[str, Column] = {}
            for layer, layer_lack in one.layers.items():
                own = np.arange(run.n_images)
                have, _ = held(run, layer, own, lack.wanted)
                ours[layer] = column(run, layer, have & layer_lack.there, own, lack.wanted)
                advance(1)
                if there is not None and layer in there.layers:
                    have, _ = held(there, layer, places, lack.wanted)
                    theirs[layer] = column(there, layer, have & layer_lack.there, places, lack.wanted)
                advance(1)
            keys = lack.source.samples.keys
            of_run[run.path].digests = (digest(run.fingerprint, keys, ours), digest(run.fingerprint, keys, theirs))


def _bring_table(lack: DatasetLack, target: Store) -> StoredDataset:
    """The data set in the target, with all images of the source."""
    name = lack.source.name
    # Also where there is nothing new: whoever brought it may have been killed before he had put all that belongs to it.
    described = metadata.own(metadata.read(lack.source.objects, f"{name}/{layout.ROOT}"))
    return target.put_samples(name, lack.table, source=str(described.get("source", "")))

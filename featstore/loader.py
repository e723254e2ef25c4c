"""Batches of stored maps for networks of your own: in one order, whatever reads them, and from where they stopped.

The order of an epoch depends on the seed, the rows and the batch alone: blocks are shuffled, and the images of a few
blocks are shuffled together, so that what is read lies close together. Workers take turns, batch by batch, which is
the order in which `torch.utils.data.DataLoader` collects; so the same batches come with no worker and with sixteen.
Each image is read once an epoch, by the worker whose batch it is in; no worker holds more than its batches.

B images of a batch, K runs, C channels, H W map height and width.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import override

from featstore.errors import (
    BadRequestError,
    FeatstoreError,
    IncompatibleError,
    NotCommittedError,
    StorageError,
    unknown_name,
)
from featstore.heads.stream import Maps, shuffled_windows
from featstore.store import Run
from featstore.store.read import check_rows

WINDOW_BLOCKS = 16
"""Blocks whose images are shuffled together."""
_FORMAT = 1


class FeatureDataset(IterableDataset[Any]):
    """Batches of the maps of some images; for ``DataLoader(dataset, batch_size=None, ...)``, or `FeatureLoader`.

    Workers have to be spawned: in a forked one, what reads a store is in a state that nobody knows.

    Args:
        runs: K runs of one data set.
        layers: names of layers that all runs have in one shape; None: all that they have in common.
        rows: row numbers of the data set's sample table; None: all. Each is read once an epoch.
        batch: images of a batch, B; the last one of an epoch may be smaller.
        seed: of the order.
        window_blocks: blocks whose images are shuffled together.
        rank: of this process among those that train together, which get other batches each.
        ranks: how many train together; all get the same number of batches, at most ``ranks`` - 1 are left out.
        transform: called in the worker with each `Maps`; what it returns is the batch. Picklable.

    Raises:
        BadRequestError: for layers that the runs have not, rows outside the table, a batch of nothing.
        NotCommittedError: if features of a row are absent or stale.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        *,
        layers: Sequence[str] | None = None,
        rows: Sequence[int] | npt.NDArray[np.int64] | None = None,
        batch: int = 16,
        seed: int = 0,
        window_blocks: int = WINDOW_BLOCKS,
        rank: int = 0,
        ranks: int = 1,
        transform: Callable[[Maps], Any] | None = None,
    ) -> None:
        if not runs:
            raise BadRequestError("a dataset needs at least one run")
        for name, value in (("batch", batch), ("window_blocks", window_blocks), ("ranks", ranks)):
            if value < 1:
                raise BadRequestError(f"{name} is {value}; 1 or more are needed")
        if not 0 <= rank < ranks:
            raise BadRequestError(f"rank {rank} is outside 0..{ranks - 1}")
        names = _common(runs, layers)
        count = runs[0].n_images
        self.rows = np.unique(check_rows(range(count) if rows is None else rows, count))
        """Row numbers that are read, ascending."""
        self.batch, self.seed, self.rank, self.ranks = batch, seed, rank, ranks
        self._window_blocks = window_blocks
        self._block_length = runs[0].block_length
        self._transform = transform
        for run in runs:
            _require(run, names, self.rows)
        # Readers, and not runs: they open nothing until they read, and pickle small.
        self._readers = [{name: run.reader(name) for name in names} for run in runs]
        self._of = [run.fingerprint for run in runs]
        # Seen by workers that live longer than an epoch, too.
        self._position = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._home = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """All but where it was made."""
        return {name: value for name, value in self.__dict__.items() if name != "_home"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A worker that was spawned is at home."""
        self.__dict__.update(state)
        self._home = os.getpid()

    def __len__(self) -> int:
        """Batches of an epoch, for this rank."""
        whole = -(-len(self.rows) // self.batch)
        return whole if self.ranks == 1 else whole // self.ranks

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Which epoch the next iteration gives, and how many of its batches are left out at the beginning."""
        if epoch < 0 or done < 0:
            raise BadRequestError(f"epoch {epoch} after {done} batches; neither can be negative")
        self._position[:] = torch.tensor([epoch, done])

    def order(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Row numbers of each batch of an epoch, for this rank."""
        numbers = self.rows // self._block_length
        blocks = np.split(self.rows, np.flatnonzero(np.diff(numbers)) + 1)
        windows = shuffled_windows(blocks, self._window_blocks, self.seed, epoch)
        order = np.concatenate([self.rows[:0], *windows])
        batches = np.split(order, range(self.batch, len(order), self.batch)) if len(order) else []
        return batches[self.rank :: self.ranks][: len(self)]

    def identity(self) -> str:
        """16 hex digits that name the order of all epochs: equal where the same batches come."""
        facts = [_FORMAT, self.batch, self.seed, self._window_blocks, self._block_length, self.rank, self.ranks]
        digest = hashlib.sha256(json.dumps([*facts, self._of, [*self._readers[0]]]).encode())
        digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def read(self, rows: npt.NDArray[np.int64]) -> Maps:
        """Maps of some rows.

        Raises:
            NotCommittedError, CorruptError, StorageError: if they cannot be read.
        """
        return Maps(
            rows=rows,
            layers={
                name: torch.stack([torch.from_numpy(run[name].rows(rows)) for run in self._readers], 1)
                for name in self._readers[0]
            },
            beside={},
        )

    @override
    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is not None and os.getpid() != self._home:
            raise BadRequestError(
                "workers of a DataLoader that reads a store have to be spawned; these are forked",
                hint='DataLoader(.., multiprocessing_context="spawn"), or FeatureLoader(dataset, workers=..)',
            )
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, done = self._position.tolist()
        return self._batches(self.order(epoch)[done:][number::count])

    def _batches(self, order: Sequence[npt.NDArray[np.int64]]) -> Iterator[Any]:
        for rows in order:
            maps = self.read(rows)
            yield maps if self._transform is None else self._transform(maps)


class FeatureLoader:
    """Goes through a `FeatureDataset` epoch by epoch, with workers or without, and can go on where another stopped.

    Each ``for`` is an epoch; after one that was left early, the next goes on behind the last batch that was given.
    Workers are spawned and stay from epoch to epoch, so a script needs ``if __name__ == "__main__":``. They hold
    ``workers * (prefetch + 1)`` batches at most, whatever the number of images.

    Args:
        dataset: what is read.
        workers: processes that read; 0: this one.
        prefetch: batches that each reads ahead.
        pin_memory: put batches where copies to a GPU are fastest.
    """

    def __init__(
        self, dataset: FeatureDataset, *, workers: int = 0, prefetch: int = 2, pin_memory: bool = False
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise BadRequestError(f"{workers} workers that read {prefetch} batches ahead; 0 and 1 are the least")
        self.dataset = dataset
        self.epoch, self.done = 0, 0
        """The epoch that is being given, and how many of its batches were."""
        several: dict[str, Any] = {"prefetch_factor": prefetch, "multiprocessing_context": "spawn"} if workers else {}
        self._loader = DataLoader(
            _Carried(dataset),
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            **several,
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        """What is left of the epoch, the next one if nothing is.

        Raises:
            FeatstoreError: what reading raises in a worker.
            StorageError: if a worker was killed.
        """
        if self.done and self.done >= len(self.dataset):
            self.epoch, self.done = self.epoch + 1, 0
        self.dataset.set_epoch(self.epoch, self.done)
        for batch in _until_a_worker_dies(iter(self._loader)):
            if isinstance(batch, _Raised):
                raise batch.error
            self.done += 1
            yield batch
        self.epoch, self.done = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where it is, as plain JSON: after the last batch that was given."""
        return {"epoch": self.epoch, "done": self.done, "order": self.dataset.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another loader was; the number of workers may be another.

        Raises:
            IncompatibleError: if its batches were others.
        """
        if state["order"] != self.dataset.identity():
            raise IncompatibleError(
                f"the state is of batches in order {state['order']}, these come in {self.dataset.identity()}",
                hint="runs, layers, rows, batch, seed, window_blocks and ranks must be the same",
            )
        self.epoch, self.done = int(state["epoch"]), int(state["done"])


class _Raised:
    """An error on its way out of a worker, whose hint `DataLoader` would drop."""

    def __init__(self, error: FeatstoreError) -> None:
        self.error = error


class _Carried(IterableDataset[Any]):
    """A dataset whose errors are its last item."""

    def __init__(self, inner: FeatureDataset) -> None:
        self._inner = inner

    def __len__(self) -> int:
        return len(self._inner)

    @override
    def __iter__(self) -> Iterator[Any]:
        return self._carry(iter(self._inner))

    def _carry(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except FeatstoreError as error:
            yield _Raised(error)


def _until_a_worker_dies(batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise StorageError(
                f"a process that reads batches is gone: {' '.join(str(error).split())}",
                hint="it may have been killed for its memory: take fewer workers or a smaller batch, and go on from "
                "the loader's state_dict",
            ) from error
        yield batch


def _common(runs: Sequence[Run], layers: Sequence[str] | None) -> list[str]:
    """Names of layers that all runs have in one shape."""
    first = runs[0]
    for run in runs[1:]:
        if run.n_images != first.n_images or run.dataset.name != first.dataset.name:
            raise BadRequestError(f"runs {first.path!r} and {run.path!r} are not of one data set")
    shared = [name for name in first.layers if all(name in run.layers for run in runs)]
    same = [name for name in shared if len({run.layers[name].shape for run in runs}) == 1]
    for name in layers or ():
        if name not in shared:
            raise unknown_name("layer", name, shared)
        if name not in same:
            shapes = ", ".join(f"{run.layers[name].shape} in {run.recipe.technique}" for run in runs)
            raise BadRequestError(f"layer {name!r} has different shapes: {shapes}")
    names = list(dict.fromkeys(layers)) if layers else same
    if not names:
        raise BadRequestError("the runs have no layer in common")
    return names


def _require(run: Run, names: Sequence[str], rows: npt.NDArray[np.int64]) -> None:
    lacking = rows[~run.valid(names)[rows]]
    if len(lacking):
        key = run.dataset.samples.keys[int(lacking[0])]
        raise NotCommittedError(
            f"features of {len(lacking)} of {len(rows)} images are missing or stale in {run.path}, e.g. of {key!r}",
            hint="extract them, or leave them out: rows=numpy.flatnonzero(run.valid(layers))",
        )


__all__ = ["FeatureDataset", "FeatureLoader"]

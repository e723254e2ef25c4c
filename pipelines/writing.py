"""Blocks on their way to the store: written by threads, bounded in bytes."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from featstore.store import Run
from featstore.store.precision import StoredMaps


class BlockWriter:
    """Writes blocks in threads while the device goes on.

    At most ``max_pending_bytes`` of maps wait; `submit` blocks when they would be exceeded (one
    block is always let through). The first write that fails stops everything: its error is raised
    by the next `submit` or on leaving the context, after the writes under way have ended.
    """

    def __init__(self, *, threads: int = 8, max_pending_bytes: int = 512 * 2**20) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="featstore-write")
        self._room = threading.Condition()
        self._pending_bytes = 0
        self._max_pending_bytes = max_pending_bytes
        self._error: BaseException | None = None

    def submit(
        self,
        run: Run,
        block: int,
        rows: Sequence[int],
        maps: Mapping[str, StoredMaps],
        committed: Callable[[], object] = lambda: None,
    ) -> None:
        """Queue the rows of one block of one run for writing.

        Args:
            run: where they belong.
            block: index of the block.
            rows: row indices in the data set's table, sorted, of that block.
            maps: for each layer those of the rows, in the run's precision; at least one.
            committed: called once all of them are written, or failed to be.
        """
        size_bytes = sum(array.nbytes for array in maps.values())
        with self._room:
            while self._pending_bytes and self._pending_bytes + size_bytes > self._max_pending_bytes:
                self._room.wait()
            self._raise_if_failed()
            self._pending_bytes += size_bytes
        # A task a layer: a write mostly waits for the disk to sync, which it does for several files as fast as for one.
        left = itertools.count(len(maps) - 1, -1)
        for layer, array in maps.items():
            future = self._pool.submit(run.write_block, block, rows, {layer: array})
            future.add_done_callback(
                functools.partial(self._done, size_bytes=array.nbytes, left=left, committed=committed)
            )

    def _done(self, future: Future[int], size_bytes: int, left: Iterator[int], committed: Callable[[], object]) -> None:
        with self._room:
            last = next(left) == 0
            self._pending_bytes -= size_bytes
            if not future.cancelled() and self._error is None:
                self._error = future.exception()
            self._room.notify_all()
        if last:
            committed()

    def _raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Interrupted or failed: what is being written is finished and committed, what waits is dropped.
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._raise_if_failed()

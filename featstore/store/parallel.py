"""Several requests at once, where they are requests; large pieces of work side by side, where they are not."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from featstore.store.objects import Objects

MAX_BYTES = 512 << 20
"""What `at_once` holds in memory at most."""
_MOST_SHARES = 4

T = TypeVar("T")
R = TypeVar("R")


def each(objects: Objects, do: Callable[[T], R], arguments: Sequence[T]) -> list[R]:
    """``do`` of every argument, in order: one after the other on a disk, several at once on a remote store.

    The first error is raised, once all that were under way have ended.
    """
    count = min(objects.parallel_reads, len(arguments))
    if count <= 1:
        return [do(argument) for argument in arguments]
    with ThreadPoolExecutor(count, thread_name_prefix="featstore-request") as pool:
        return list(pool.map(do, arguments))


def shares(arguments: Sequence[T], *, at_least: int) -> list[Sequence[T]]:
    """``arguments`` cut into about equal parts, one a processor and `_MOST_SHARES` at most, each of ``at_least``."""
    count = max(1, min(_processors(), _MOST_SHARES, len(arguments) // at_least))
    length = max(1, -(-len(arguments) // count))
    return [arguments[first : first + length] for first in range(0, len(arguments), length)]


def _processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(do: Callable[[T], R], arguments: Sequence[T]) -> list[R]:
    """``do`` of every argument, in order: the first one here, each other in a thread of its own.

    The threads end with the call, so a process that forks later inherits none that is gone.
    """
    if len(arguments) <= 1:
        return [do(argument) for argument in arguments]
    with ThreadPoolExecutor(len(arguments) - 1, thread_name_prefix="featstore-share") as pool:
        others = [pool.submit(do, argument) for argument in arguments[1:]]
        return [do(arguments[0]), *(other.result() for other in others)]


def at_once(
    do: Callable[[T], R], arguments: Iterable[T], *, size: Callable[[T], int], count: int
) -> Generator[tuple[T, R], None, None]:
    """``do`` of every argument, ``count`` at once and no more than `MAX_BYTES` of them; pairs as they are done.

    However large one is, one is always let through. When it ends early, because of an error or because nobody asks
    for more, what is under way is waited for.
    """
    under_way: dict[Future[R], T] = {}
    pool = ThreadPoolExecutor(count, thread_name_prefix="featstore-blocks")

    def finished() -> Iterator[tuple[T, R]]:
        done, _ = wait(under_way, return_when=FIRST_COMPLETED)
        for future in done:
            yield under_way.pop(future), future.result()

    try:
        for argument in arguments:
            while under_way and (
                len(under_way) >= count or sum(map(size, under_way.values())) + size(argument) > MAX_BYTES
            ):
                yield from finished()
            under_way[pool.submit(do, argument)] = argument
        while under_way:
            yield from finished()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

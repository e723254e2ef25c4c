"""crc32c by the fastest routine that is installed: most of what reading a map costs beside copying it.

The `crc32c` package computes some 30 GB/s on one core of a recent x86 processor, awscrt (the extra ``speed``) three
times as much where there is AVX-512 and the bytes are in the second-level cache, as those of a piece just read are; on
bytes from memory it is the slower one. It takes tens of milliseconds to import, so records and documents do without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from crc32c import crc32c

_LARGE_BYTES = 1 << 15
"""Bytes from which on the faster routine gains more than asking for it costs."""

Routine = Callable[[bytes | memoryview, int], int]


__all__ = ["crc32c", "crc32c_cached", "fastest"]


def crc32c_cached(data: bytes | memoryview, value: int = 0) -> int:
    """The crc32c of contiguous bytes that were just copied here.

    Args:
        data: the bytes.
        value: crc32c of what came before them.
    """
    routine = crc32c if len(data) < _LARGE_BYTES else fastest()
    result: int = routine(data, value)
    return result


@functools.cache
def fastest() -> Routine:
    """The routine for large pieces."""
    try:
        from awscrt import checksums
    except ImportError:
        found: Routine = crc32c
        return found
    routine: Routine = checksums.crc32c
    return routine

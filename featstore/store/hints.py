"""Hints to Linux that make writing a large file faster; elsewhere, and where it refuses, nothing happens.

None of them makes anything durable or changes what a file holds.
"""

from __future__ import annotations

import ctypes
from typing import Any

_SYNC_FILE_RANGE_WRITE = 2
_OFFSET = ctypes.c_int64


def _function(name: str, *arguments: Any) -> Any:
    """The C library's function ``name``; None where there is none."""
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    function.argtypes = arguments
    return function


_sync_file_range = _function("sync_file_range", ctypes.c_int, _OFFSET, _OFFSET, ctypes.c_uint)


def begin_writing_back(fd: int, offset: int, length: int) -> None:
    """Let the disk begin with ``length`` bytes from ``offset``, so that a later fsync finds less to do."""
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)

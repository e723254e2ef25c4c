"""Rows of lazy arrays, read block by block, each block once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import dask
import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError

Rows = Sequence[int] | npt.NDArray[np.int64]
"""Row numbers of a sample table."""

_WINDOW_BYTES = 64 * 1024**2


def rows_by_block(array: Any, rows: Rows) -> list[npt.NDArray[np.int64]]:
    """Positions in ``rows`` (not the rows themselves), one array a block of ``array``, in block order.

    Args:
        array: a ``dask.array``; its chunks along the first axis are the blocks.
        rows: row numbers, in any order.
    """
    wanted = np.asarray(rows, np.int64)
    ends = np.cumsum(array.chunks[0])
    block = np.searchsorted(ends, wanted, side="right")
    order = np.argsort(block, kind="stable")
    cuts = np.flatnonzero(np.diff(block[order])) + 1
    return [part for part in np.split(order, cuts) if len(part)]


def read_rows(array: Any, rows: Rows, *, what: str) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[Any]]]:
    """Read rows of a lazy array; at most about 64 MiB of blocks (one at the least) are in flight.

    Args:
        array: ``dask.array`` (N, C, H, W), float16 or float32.
        rows: row numbers, in any order.
        what: name of the array for messages, such as "layer up-level0-upsampler-out of run basic".

    Yields:
        Positions in ``rows``, and those rows' values (len(positions), C, H, W) as stored.

    Raises:
        BadRequestError: if a value is NaN or infinite. Errors of the array's own tasks, such as
            NotCommittedError and CorruptError of a store, come through.
    """
    block_bytes = max(array.chunks[0]) * int(np.prod(array.shape[1:])) * array.dtype.itemsize
    window = max(1, _WINDOW_BYTES // block_bytes)
    parts = rows_by_block(array, rows)
    wanted = np.asarray(rows, np.int64)
    for first in range(0, len(parts), window):
        positions = parts[first : first + window]
        # one small slice a block: an index over all blocks at once makes dask rechunk and shuffle
        blocks = dask.compute(*(array[wanted[p].min() : wanted[p].max() + 1] for p in positions))
        for place, block in zip(positions, blocks, strict=True):
            values = check_finite(block[wanted[place] - wanted[place].min()], wanted[place], what)
            yield place, values


def check_finite(values: npt.NDArray[Any], rows: npt.NDArray[np.int64], what: str) -> npt.NDArray[Any]:
    """``values`` (len(rows), ...), refused with the rows' numbers where a value is NaN or infinite."""
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    if not finite.all():
        raise BadRequestError(
            f"{what} holds NaN or infinity in rows {', '.join(map(str, rows[~finite][:5]))}",
            hint="leave these rows out, or extract them again after `featstore verify --repair`",
        )
    return values

"""The committed record: for every image of a block the digest of what its row was computed from.

One chunk of ``committed/<layer>`` a block: little-endian uint64 values and their crc32c, read here
without zarr, because planning a finished extraction reads nothing else. 0 is absent; a value that
differs from the sample table's is stale.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from featstore.errors import CorruptError, NotFoundError
from featstore.store import layout
from featstore.store.objects import Objects
from featstore.store.shard import CRC_BYTES, checksum

Record = npt.NDArray[np.uint64]
"""(block length,) for a block, (N,) for a run."""

REMEDY = "run `featstore verify --repair`, then the same `featstore extract` again: it recomputes what is broken"


def digest64(digest: str) -> int:
    """First 8 bytes of a SHA-256 (hex) as a number; 0, which means absent, becomes 1."""
    return int.from_bytes(bytes.fromhex(digest)[:8], "big") or 1


def as_records(digests: npt.NDArray[np.uint8]) -> Record:
    """`digest64` of each of n digests, uint8 (n, 32); (n,) uint64."""
    values = np.ascontiguousarray(digests[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
    values[values == 0] = 1
    return values


def read_record(objects: Objects, run: str, layer: str, block: int, block_length: int) -> Record:
    """A block's record, (block_length,); zeros if nothing of it was ever committed.

    Raises:
        CorruptError: if it has another length or does not match its crc32c.
    """
    return view_record(objects, run, layer, block, block_length).copy()


def view_record(objects: Objects, run: str, layer: str, block: int, block_length: int) -> Record:
    """`read_record`, read-only: the same array, while it is remembered, as long as the same bytes are read."""
    key = layout.record_key(run, layer, block)
    try:
        data = objects.get(key, max_bytes=8 * block_length + CRC_BYTES)
        return _record(data, block_length)
    except NotFoundError:
        return np.zeros(block_length, dtype=np.uint64)
    except CorruptError as error:
        raise CorruptError(f"{key} is damaged: {error}", hint=REMEDY) from None


@functools.lru_cache(maxsize=256)
def _record(data: bytes, block_length: int) -> Record:
    # The same bytes mean the same: they are read every time, and checked once.
    if len(data) != 8 * block_length + CRC_BYTES or checksum(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise CorruptError("it does not match its crc32c")
    record = np.frombuffer(data, dtype="<u8", count=block_length).astype(np.uint64)
    record.flags.writeable = False
    return record


def write_record(objects: Objects, run: str, layer: str, block: int, record: Record, *, settled: bool = True) -> int:
    """Put a block's record; returns the bytes written.

    Args:
        objects: where the store lies.
        run: path of the run.
        layer: name of the layer.
        block: number of the block.
        record: (block length,).
        settled: whether it must survive a power cut; else it may turn into the one of before until `settle`.
    """
    data = record.astype("<u8").tobytes()
    put = objects.put if settled else objects.put_unsettled
    return put(layout.record_key(run, layer, block), data, checksum(data))


def settle(objects: Objects, run: str, layer: str) -> None:
    """Let all records of a layer survive a power cut, whoever put them; StorageError if the disk fails."""
    objects.settle(layout.committed_key(run, layer).rpartition("/")[0])

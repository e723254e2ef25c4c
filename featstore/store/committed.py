"""The committed record: for every image of a block the digest of what its row was computed from.

One chunk of ``committed/<layer>`` a block: little-endian uint64 values and their crc32c, read here
without zarr, because planning a finished extraction reads nothing else. 0 is absent; a value that
differs from the sample table's is stale.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def digests64(digests: Sequence[str]) -> Record:
    """`digest64` of each of the N ``digests``, (N,) uint64."""
    values = np.frombuffer(bytes.fromhex("".join(digest[:16] for digest in digests)), dtype=">u8").astype(np.uint64)
    values[values == 0] = 1
    return values


def read_record(objects: Objects, run: str, layer: str, block: int, block_length: int) -> Record:
    """A block's record, (block_length,); zeros if nothing of it was ever committed.

    Raises:
        CorruptError: if it has another length or does not match its crc32c.
    """
    key = layout.record_key(run, layer, block)
    length = 8 * block_length + CRC_BYTES
    try:
        data = objects.get(key, max_bytes=length)
    except NotFoundError:
        return np.zeros(block_length, dtype=np.uint64)
    except CorruptError as error:
        raise CorruptError(f"{key} is damaged: {error}", hint=REMEDY) from None
    if len(data) != length or checksum(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise CorruptError(f"{key} is damaged: it does not match its crc32c", hint=REMEDY)
    return np.frombuffer(data, dtype="<u8", count=block_length).astype(np.uint64)


def write_record(objects: Objects, run: str, layer: str, block: int, record: Record) -> int:
    """Put a block's record, durably; returns the bytes written."""
    data = record.astype("<u8").tobytes()
    return objects.put(layout.record_key(run, layer, block), data, checksum(data))


def read_records(objects: Objects, run: str, layer: str, n_images: int, block_length: int) -> Record:
    """The records of all blocks of a run, (n_images,).

    Raises:
        CorruptError: as `read_record`.
    """
    blocks = range(-(-n_images // block_length))
    parts = [read_record(objects, run, layer, block, block_length) for block in blocks]
    return np.concatenate(parts)[:n_images] if parts else np.zeros(0, dtype=np.uint64)

"""A block's bytes in zarr's ``sharding_indexed`` layout, written and read without a copy.

Layout: for each image that is present its raw little-endian values and their crc32c (4 bytes), one
after the other; then one (offset, length) pair of little-endian uint64 an image of the block, both
2^64-1 where the image is absent; then the crc32c of those pairs. ``length`` includes the 4 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from featstore.errors import CorruptError
from featstore.store.objects import Snapshot

CRC_BYTES = 4
ABSENT = 2**64 - 1

Index = npt.NDArray[np.uint64]


def byte_view(values: npt.NDArray[Any]) -> memoryview:
    """The bytes of the C-contiguous array ``values``, without a copy."""
    return values.reshape(-1).view(np.uint8).data


def checksum(data: bytes | memoryview) -> bytes:
    """The crc32c of ``data`` as zarr stores it."""
    return int(crc32c(data)).to_bytes(CRC_BYTES, "little")


def encode(images: Mapping[int, memoryview], block_length: int) -> list[bytes | memoryview]:
    """A shard, as buffers to be written one after the other.

    Args:
        images: raw bytes of each image that is present, by its place in the block; all of one length.
        block_length: images that the block has room for.
    """
    index = np.full((block_length, 2), ABSENT, dtype="<u8")
    buffers: list[bytes | memoryview] = []
    offset = 0
    for slot, data in sorted(images.items()):
        length = data.nbytes + CRC_BYTES
        index[slot] = (offset, length)
        buffers += [data, checksum(data)]
        offset += length
    entries = index.tobytes()
    return [*buffers, entries, checksum(entries)]


def read_index(snapshot: Snapshot, block_length: int, image_bytes: int) -> Index:
    """The (block_length, 2) uint64 index of a shard, checked against its crc32c and the file's size.

    Raises:
        CorruptError: if it is truncated, its checksum differs, or an entry points outside.
    """
    length = block_length * 16 + CRC_BYTES
    data = snapshot.read_tail(length)
    body_bytes = snapshot.size_bytes - length
    if checksum(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise CorruptError("its index is broken, or it is truncated: the index does not match its crc32c")
    index = np.frombuffer(data, dtype="<u8", count=2 * block_length).reshape(block_length, 2)
    for offset, size in index.tolist():
        if (offset, size) != (ABSENT, ABSENT) and (size != image_bytes + CRC_BYTES or offset + size > body_bytes):
            raise CorruptError(f"its index is broken: ({offset}, {size}) is no image of {image_bytes} bytes in it")
    return index


def read_images(
    snapshot: Snapshot, index: Index, slots: Sequence[int], targets: Sequence[memoryview]
) -> dict[int, str]:
    """Read the images in ``slots`` into ``targets`` (writable bytes, one image each), checksums checked.

    Images that lie one after the other are read by one positioned read.

    Returns:
        What is wrong, by slot, for those that are absent or whose crc32c differs; empty if all is well.
    """
    wrong = {slot: "it is absent from the shard" for slot in slots if int(index[slot, 0]) == ABSENT}
    checksums = bytearray(CRC_BYTES * len(slots))
    crc_view = memoryview(checksums)
    start, end = 0, -1
    pending: list[memoryview] = []
    order = sorted((int(index[slot, 0]), number) for number, slot in enumerate(slots) if slot not in wrong)
    for offset, number in order:
        if offset != end:
            if pending:
                snapshot.read_into(start, pending)
            start, pending = offset, []
        pending += [targets[number], crc_view[number * CRC_BYTES : (number + 1) * CRC_BYTES]]
        end = offset + targets[number].nbytes + CRC_BYTES
    if pending:
        snapshot.read_into(start, pending)
    for _, number in order:
        if checksum(targets[number]) != checksums[number * CRC_BYTES : (number + 1) * CRC_BYTES]:
            wrong[slots[number]] = "its bytes do not match their crc32c"
    return wrong

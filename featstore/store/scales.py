"""The sidecar of int8 maps: a block's scales, one float32 an image and channel.

A shard of scales has zarr's ``sharding_indexed`` layout (see `featstore.store.shard`), and after each image's
scales and their crc32c stand 4 bytes that the index does not speak of and other readers pass over: the crc32c of
the very map that the scales belong to. A map and its scales lie in two objects, which nothing but this ties
together: two writers of one block on a store without locks, or a block rewritten twice under a reader's eyes, could
leave one's map beside the other's scales. Every read compares them, so such a pair is damage and never a value.

Shapes: C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from featstore.errors import CorruptError, NotFoundError
from featstore.store.objects import Objects
from featstore.store.precision import Scales, sound
from featstore.store.shard import ABSENT, CRC_BYTES, checksum


def encode(scales: Mapping[int, Scales], seals: Mapping[int, bytes], block_length: int) -> list[bytes | memoryview]:
    """A shard, as buffers to be written one after the other.

    Args:
        scales: (C,) of each image that is present, by its place in the block.
        seals: crc32c of the int8 map of each of them.
        block_length: images that the block has room for.
    """
    index = np.full((block_length, 2), ABSENT, dtype="<u8")
    buffers: list[bytes | memoryview] = []
    offset = 0
    for slot, row in sorted(scales.items()):
        data = np.ascontiguousarray(row, dtype="<f4").tobytes()
        index[slot] = (offset, len(data) + CRC_BYTES)
        buffers += [data, checksum(data), seals[slot]]
        offset += len(data) + 2 * CRC_BYTES
    entries = index.tobytes()
    return [*buffers, entries, checksum(entries)]


def read(
    objects: Objects,
    key: str,
    block_length: int,
    slots: Sequence[int],
    seals: Sequence[bytes],
    targets: Sequence[Scales],
) -> dict[int, str]:
    """Read the scales of some images of a block, and check that they belong to their maps.

    Args:
        objects: where the store lies.
        key: of the shard.
        block_length: images in a block.
        slots: places of the images in the block.
        seals: crc32c of each of their maps, as it was read.
        targets: (C,) float32 of each of them; filled.

    Returns:
        What is wrong, by slot; empty if all is well.

    Raises:
        StorageError: if the disk or the other side fails.
    """
    if not slots:
        return {}
    channels = len(targets[0])
    length = 4 * channels + CRC_BYTES
    tail = 16 * block_length + CRC_BYTES
    try:
        # All of it in one request: it is small beside a map.
        data = objects.get(key, max_bytes=block_length * (length + CRC_BYTES) + tail)
    except NotFoundError:
        return dict.fromkeys(slots, "the shard of its scales is gone")
    except CorruptError as error:
        return dict.fromkeys(slots, f"its scales: {error}")
    entries = data[-tail:-CRC_BYTES]
    if len(data) < tail or checksum(entries) != data[-CRC_BYTES:]:
        return dict.fromkeys(slots, "the index of its scales does not match its crc32c")
    index = np.frombuffer(entries, dtype="<u8").reshape(block_length, 2)
    wrong = {}
    for slot, wanted, target in zip(slots, seals, targets, strict=True):
        offset, size = (int(value) for value in index[slot])
        if size != length or offset + length + CRC_BYTES > len(data) - tail:
            wrong[slot] = "its scales are absent from their shard"
            continue
        row, crc, found = (
            data[offset : offset + length - CRC_BYTES],
            data[offset + length - CRC_BYTES : offset + length],
            data[offset + length : offset + length + CRC_BYTES],
        )
        target[...] = np.frombuffer(row, dtype="<f4")
        if checksum(row) != crc:
            wrong[slot] = "its scales do not match their crc32c"
        elif found != wanted:
            wrong[slot] = "its scales belong to another map"
        elif not sound(target).all():
            wrong[slot] = "its scales are negative, not finite, or beyond float16"
    return wrong

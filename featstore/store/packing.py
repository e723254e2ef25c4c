"""Maps behind zstd, for ``--compress``: an image of a shard is one frame, and whatever it unpacks to is checked.

In the shard (see `featstore.store.shard`) each image's frame and the frame's crc32c, which the index speaks of and any
reader of zarr's ``zstd`` and ``crc32c`` codecs understands, are followed by 4 bytes that it does not speak of: the
crc32c of the map itself. It says that two stores hold the same map, packed or not, without unpacking it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numcodecs.zstd import Zstd

from featstore.store import shard
from featstore.store.layout import RAW
from featstore.store.objects import Objects, Snapshot
from featstore.store.shard import ABSENT, CRC_BYTES, checksum

LEVEL = 3
_CODEC: Mapping[str, Any] = {"name": "zstd", "configuration": {"level": LEVEL, "checksum": True}}
CODECS: Sequence[Mapping[str, Any]] = (RAW[0], _CODEC, *RAW[1:])
"""Codecs of packed maps in a zarr document."""
_zstd = Zstd(level=LEVEL, checksum=True)


def pack(image: memoryview) -> memoryview:
    """The bytes of one map as a zstd frame, with a checksum of its own."""
    return memoryview(_zstd.encode(image))


def encode(
    frames: Mapping[int, memoryview], seals: Mapping[int, bytes], record: npt.NDArray[np.uint64], key: str
) -> list[bytes | memoryview]:
    """A shard, as buffers to be written one after the other.

    Args:
        frames: of each image that is present, by its place in the block.
        seals: crc32c of the map of each of them.
        record: (images that the block has room for,) what each of them was computed from.
        key: of the shard.
    """
    index = np.full((len(record), 2), ABSENT, dtype="<u8")
    label = np.zeros(len(record), dtype="<u8")
    buffers: list[bytes | memoryview] = []
    offset = 0
    for slot, frame in sorted(frames.items()):
        label[slot] = record[slot]
        index[slot] = (offset, frame.nbytes + CRC_BYTES)
        buffers += [frame, checksum(frame), seals[slot]]
        offset += frame.nbytes + 2 * CRC_BYTES
    return [*buffers, *shard.tail(label, index, key)]


def read(
    objects: Objects, key: str, record: npt.NDArray[np.uint64], slots: Sequence[int], targets: Sequence[memoryview]
) -> dict[int, str]:
    """Read and unpack the images in ``slots``; arguments, result and errors as `shard.read`."""
    frames, seals, wrong = read_packed(objects, key, record, slots)
    for slot, target in zip(slots, targets, strict=True):
        if slot in frames and not _unpack(frames[slot], target, seals[slot]):
            wrong[slot] = "it does not unpack to the map whose crc32c stands beside it"
    return wrong


def _unpack(frame: memoryview, target: memoryview, seal: bytes) -> bool:
    """Fill ``target`` with what a frame holds; whether that is the map that it should be."""
    try:
        _zstd.decode(frame, out=target)
    except (RuntimeError, ValueError):
        return False
    return checksum(target) == seal


def read_packed(
    objects: Objects, key: str, record: npt.NDArray[np.uint64], slots: Sequence[int]
) -> tuple[dict[int, memoryview], dict[int, bytes], dict[int, str]]:
    """The images in ``slots`` as they lie in a shard.

    Args:
        objects: where the store lies.
        key: of the shard.
        record: (images that the block has room for,) what each row should have been computed from.
        slots: places of the images in the block.

    Returns:
        By place the frames of those that are sound, the crc32c of their maps, and what is wrong with the others.

    Raises:
        NotFoundError, CorruptError, StorageError: as `shard.read`.
    """

    def images(snapshot: Snapshot) -> tuple[dict[int, memoryview], dict[int, bytes], dict[int, str]]:
        index = shard.read_index(snapshot, key, len(record), None)
        wrong: dict[int, str] = {}
        places: dict[int, tuple[int, int]] = {}
        for slot in dict.fromkeys(slots):
            offset, length = index.entries[slot].tolist()
            if offset == ABSENT:
                wrong[slot] = "it is absent from the shard"
            elif index.label[slot] != record[slot]:
                wrong[slot] = "the shard holds features of another image there"
            else:
                places[slot] = offset, length
        data = {slot: memoryview(bytearray(length + CRC_BYTES)) for slot, (_, length) in places.items()}
        snapshot.read_many([(places[slot][0], [data[slot]]) for slot in sorted(places, key=places.__getitem__)])
        frames, seals = {}, {}
        for slot, piece in data.items():
            frame, crc = piece[: -2 * CRC_BYTES], piece[-2 * CRC_BYTES : -CRC_BYTES]
            if checksum(frame) == crc:
                frames[slot], seals[slot] = frame, bytes(piece[-CRC_BYTES:])
            else:
                wrong[slot] = "its bytes do not match their crc32c"
        return frames, seals, wrong

    return objects.read_with(key, images)

"""A block's bytes in zarr's ``sharding_indexed`` layout, written and read without a copy.

Layout: for each image that is present its raw little-endian values and their crc32c (4 bytes), one
after the other; then the label; then one (offset, length) pair of little-endian uint64 an image of the
block, both 2^64-1 where the image is absent; then the crc32c of those pairs. ``length`` includes the 4 bytes.

The label, which the pairs do not speak of and other readers pass over, says what the shard holds and where it
belongs: one little-endian uint64 an image of the block (`featstore.store.committed.digest64` of the image that the
row was computed from, 0 where it is absent), the first 8 bytes of the SHA-256 of the shard's key, and the crc32c of
both. A checksum tells that bytes are as they were written, and not that they are those that a record speaks of: a
shard of another run, restored from an older backup, or put by another writer than the record beside it (where
nothing locks a block) has sound bytes too. Every read compares the label, so such a pair is damage and never a value.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featstore.errors import CorruptError
from featstore.store import parallel
from featstore.store.crc import crc32c
from featstore.store.objects import Objects, Snapshot

CRC_BYTES = 4
ABSENT = 2**64 - 1
_PLACE_BYTES = 8
_PIECE_BYTES = 512 << 10
_SMALL_BYTES = 64 << 10
_SHARE_BYTES = 8 << 20


class Index(NamedTuple):
    """What a shard says of the n places of its block."""

    entries: npt.NDArray[np.uint64]
    """(n, 2): offset and length in bytes, both `ABSENT` where there is no image."""
    label: npt.NDArray[np.uint64]
    """(n,): what each row was computed from, 0 where there is no image."""


def byte_view(values: npt.NDArray[Any]) -> memoryview:
    """The bytes of the C-contiguous array ``values``, without a copy."""
    return values.reshape(-1).view(np.uint8).data


def checksum(data: bytes | memoryview) -> bytes:
    """The crc32c of ``data`` as zarr stores it."""
    return int(crc32c(data)).to_bytes(CRC_BYTES, "little")


def encode(images: Mapping[int, memoryview], record: npt.NDArray[np.uint64], key: str) -> Iterator[bytes | memoryview]:
    """A shard, in parts to be written one after the other.

    Large images come in pieces, each checksummed right before: whoever writes it finds it in the processor's cache.
    Small ones come joined: copying them costs less than naming each to the kernel.

    Args:
        images: raw bytes of each image that is present, by its place in the block; all of one length.
        record: (images that the block has room for,) what each of them was computed from.
        key: of the shard.
    """
    index = np.full((len(record), 2), ABSENT, dtype="<u8")
    label = np.zeros(len(record), dtype="<u8")
    slots = sorted(images)
    length = CRC_BYTES + (images[slots[0]].nbytes if slots else 0)
    label[slots] = record[slots]
    index[slots, 0] = np.arange(len(slots)) * length
    index[slots, 1] = length
    if length <= _SMALL_BYTES:
        at_once = _PIECE_BYTES // length
        for first in range(0, len(slots), at_once):
            some = [images[slot] for slot in slots[first : first + at_once]]
            yield b"".join([part for image in some for part in (image, checksum(image))])
    else:
        for slot in slots:
            yield from _pieces(images[slot])
    yield from tail(label, index, key)


def _pieces(image: memoryview) -> Iterator[bytes | memoryview]:
    """A large image in pieces, then its crc32c."""
    crc = 0
    for at in range(0, len(image), _PIECE_BYTES):
        piece = image[at : at + _PIECE_BYTES]
        crc = crc32c(piece, crc)
        yield piece
    yield crc.to_bytes(CRC_BYTES, "little")


def tail(label: npt.NDArray[np.uint64], index: npt.NDArray[np.uint64], key: str) -> list[bytes]:
    """What follows the images of a shard: label and index (`Index`), each with its crc32c."""
    said, entries = label.tobytes() + _place(key), index.tobytes()
    return [said, checksum(said), entries, checksum(entries)]


@functools.lru_cache(maxsize=4096)
def _place(key: str) -> bytes:
    """Where the shard ``key`` belongs, as its label says it."""
    return hashlib.sha256(key.encode()).digest()[:_PLACE_BYTES]


def read_index(snapshot: Snapshot, key: str, block_length: int, image_bytes: int | None) -> Index:
    """What the shard ``key`` says of its places, checked against its checksums and the file's size; read-only.

    Args:
        snapshot: of the shard.
        key: of the shard.
        block_length: images that the block has room for.
        image_bytes: bytes of each image; None: they differ.

    Raises:
        CorruptError: if it is truncated, a checksum differs, an entry points outside, or it is another shard.
    """
    data = snapshot.read_tail(8 * block_length + _PLACE_BYTES + CRC_BYTES + 16 * block_length + CRC_BYTES)
    return _index(data, _place(key), block_length, image_bytes, snapshot.size_bytes - len(data))


@functools.lru_cache(maxsize=256)
def _index(data: bytes, place: bytes, block_length: int, image_bytes: int | None, body_bytes: int) -> Index:
    # The same few bytes mean the same: they are read every time, and checked entry by entry once.
    cut = 8 * block_length + _PLACE_BYTES
    said, crc = data[:cut], data[cut : cut + CRC_BYTES]
    entries = _entries(data[cut + CRC_BYTES :], image_bytes, body_bytes)
    if checksum(said) != crc:
        raise CorruptError("its label is broken: it does not match its crc32c")
    if said[-_PLACE_BYTES:] != place:
        raise CorruptError("it is another shard, which does not belong in this place")
    return Index(entries, np.frombuffer(said, dtype="<u8", count=block_length))


def read_entries(snapshot: Snapshot, block_length: int, image_bytes: int | None) -> npt.NDArray[np.uint64]:
    """The (offset, length) pairs of any sharded array's shard, (block_length, 2); errors of `read_index`."""
    data = snapshot.read_tail(16 * block_length + CRC_BYTES)
    return _entries(data, image_bytes, snapshot.size_bytes - len(data))


def _entries(data: bytes, image_bytes: int | None, body_bytes: int) -> npt.NDArray[np.uint64]:
    if checksum(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise CorruptError("its index is broken, or it is truncated: the index does not match its crc32c")
    entries = np.frombuffer(data[:-CRC_BYTES], dtype="<u8").reshape(-1, 2)
    for offset, size in entries.tolist():
        fits = size > CRC_BYTES if image_bytes is None else size == image_bytes + CRC_BYTES
        if (offset, size) != (ABSENT, ABSENT) and not (fits and offset + size <= body_bytes):
            what = "" if image_bytes is None else f" of {image_bytes} bytes"
            raise CorruptError(f"its index is broken: ({offset}, {size}) is no image{what} in it")
    return entries


def read(
    objects: Objects,
    key: str,
    record: npt.NDArray[np.uint64],
    slots: Sequence[int],
    targets: Sequence[memoryview],
) -> dict[int, str]:
    """Read the images in ``slots`` of the shard ``key``, all from one state of it; see `read_images`.

    Args:
        objects: where the store lies.
        key: of the shard.
        record: (images that the block has room for,) what each row should have been computed from.
        slots: places of the images in the block.
        targets: writable bytes, one image each.

    Raises:
        NotFoundError: if there is no such shard.
        CorruptError: if its index is broken.
        StorageError: if the disk or the other side fails.
    """

    def images(snapshot: Snapshot) -> dict[int, str]:
        index = read_index(snapshot, key, len(record), targets[0].nbytes)
        return read_images(snapshot, index, record, slots, targets)

    return objects.read_with(key, images)


def read_images(
    snapshot: Snapshot,
    index: Index,
    record: npt.NDArray[np.uint64],
    slots: Sequence[int],
    targets: Sequence[memoryview],
) -> dict[int, str]:
    """Read the images in ``slots`` into ``targets`` (writable bytes, one image each), label and checksums checked.

    Images that lie one after the other are read together, and where reading is copying from memory
    (`Snapshot.piece_bytes`) in pieces, each checksummed while the processor's cache still holds it.

    Returns:
        What is wrong, by slot, for those that are absent, of another image than ``record`` says, or whose crc32c
        differs; empty if all is well.
    """
    offset_of, found, wanted = index.entries.item, index.label.item, record.item
    wrong: dict[int, str] = {}
    order: list[tuple[int, int]] = []
    for number, slot in enumerate(slots):
        offset = offset_of(slot, 0)
        if offset == ABSENT:
            wrong[slot] = "it is absent from the shard"
        elif found(slot) != wanted(slot):
            wrong[slot] = "the shard holds features of another image there"
        else:
            order.append((offset, number))
    order.sort()
    if snapshot.piece_bytes is None:
        unsound = _read_together(snapshot, order, targets)
    elif len(order) == 1 or (order and targets[0].nbytes > snapshot.piece_bytes):

        def read_some(part: Sequence[tuple[int, int]]) -> list[int]:
            return [number for offset, number in part if not _read_one(snapshot, offset, targets[number])]

        shares = parallel.shares(order, at_least=_SHARE_BYTES // targets[0].nbytes + 1)
        unsound = list(itertools.chain(*parallel.side_by_side(read_some, shares)))
    else:
        step = max(1, snapshot.piece_bytes // targets[0].nbytes) if order else 1
        parts = (order[first : first + step] for first in range(0, len(order), step))
        unsound = [number for part in parts for number in _read_together(snapshot, part, targets)]
    for number in unsound:
        wrong[slots[number]] = "its bytes do not match their crc32c"
    return wrong


def _read_one(snapshot: Snapshot, offset: int, target: memoryview) -> bool:
    """Read one image from ``offset`` on; whether its crc32c is the one that follows it."""
    stored = bytearray(CRC_BYTES)
    return snapshot.read_summed(offset, target, memoryview(stored)) == int.from_bytes(stored, "little")


def _read_together(snapshot: Snapshot, order: Sequence[tuple[int, int]], targets: Sequence[memoryview]) -> list[int]:
    """Read several images, those that lie one after the other by one extent; the numbers of those that are broken.

    Args:
        snapshot: the shard.
        order: (offset, number) of each image, sorted.
        targets: for each number, where its bytes go.
    """
    stored = np.empty(len(order), dtype="<u4")
    checksums = byte_view(stored)
    extents: list[tuple[int, list[memoryview]]] = []
    end = -1
    for place, (offset, number) in enumerate(order):
        if offset != end:
            extents.append((offset, []))
        target = targets[number]
        extents[-1][1].extend((target, checksums[place * CRC_BYTES : (place + 1) * CRC_BYTES]))
        end = offset + target.nbytes + CRC_BYTES
    snapshot.read_many(extents)
    pairs = zip(order, stored.tolist(), strict=True)
    return [number for (_, number), crc in pairs if crc32c(targets[number]) != crc]

"""The digest of a run: two stores that hold the same features of the same images give the same.

It is the SHA-256 over the run's fingerprint, the keys of the images in their alphabetical order, and for each
layer the committed record and the crc32c of each image's bytes. So it does not depend on where rows lie, on block
lengths, or on what else a store holds, and it costs reading a few bytes an image. Checksums are taken from where
they are stored; that they are those of the bytes beside them is what reading and `featstore verify` see to.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from featstore.errors import CorruptError, NotFoundError
from featstore.recipe import canonical_json
from featstore.store import layout, shard
from featstore.store.committed import Record, as_records
from featstore.store.objects import Objects, Snapshot
from featstore.store.parallel import each
from featstore.store.read import Rows
from featstore.store.run import Run

_WHOLE_BYTES = 1 << 18
"""Shards up to this size are read whole: one request instead of one an image."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Column:
    """What one layer holds of n images."""

    records: Record
    """(n,) what each row was computed from, 0 where it is absent."""
    checksums: npt.NDArray[np.uint32]
    """(n, objects that hold a map: 1, or 2 with its scales) crc32c, 0 where it is absent or cannot be read."""


def run_digest(run: Run) -> str:
    """The digest of all that a run holds of the images as its sample table has them, in all of its layers.

    Raises:
        CorruptError: if a record is broken.
    """
    wanted = as_records(run.dataset.samples.digest_bytes(0, run.n_images))
    rows = np.arange(run.n_images)
    columns = {layer: column(run, layer, run.valid([layer]), rows, wanted) for layer in run.layers}
    return digest(run.fingerprint, run.dataset.samples.keys, columns)


def digest(fingerprint: str, keys: Sequence[str], columns: Mapping[str, Column]) -> str:
    """SHA-256 (hex) of what layers hold of the images ``keys``; images and layers without features do not count."""
    columns = {layer: one for layer, one in columns.items() if one.records.any()}
    some = np.zeros(len(keys), dtype=np.bool_)
    for one in columns.values():
        some |= one.records != 0
    order = sorted(np.flatnonzero(some).tolist(), key=keys.__getitem__)
    sha = hashlib.sha256()
    for text in (
        canonical_json({"fingerprint": fingerprint, "images": len(order), "layers": sorted(columns)}),
        *(keys[row].encode() for row in order),
    ):
        sha.update(len(text).to_bytes(8, "little"))
        sha.update(text)
    for layer in sorted(columns):
        sha.update(columns[layer].records[order].astype("<u8").tobytes())
        sha.update(columns[layer].checksums[order].astype("<u4").tobytes())
    return sha.hexdigest()


def column(run: Run, layer: str, have: npt.NDArray[np.bool_], rows: Rows, wanted: Record) -> Column:
    """What a layer holds of n images.

    Args:
        run: the run.
        layer: name of the layer.
        have: (n,) which of them it holds.
        rows: (n,) row of each.
        wanted: (n,) what each that it holds was computed from.
    """
    objects, info = run.dataset.objects, run.layers[layer]
    # Of a map, which differs where they are packed, and of its scales.
    lengths = (None if run.compressed else info.image_bytes, info.stored_bytes - info.image_bytes)
    shards = len(layout.layer_shards(run.path, layer, 0, info.dtype))
    checksums = np.zeros((len(rows), shards), dtype=np.uint32)
    there = np.flatnonzero(have)
    blocks = rows[there] // run.block_length

    def read(block: int) -> None:
        some = there[blocks == block]
        slots = (rows[some] - block * run.block_length).tolist()
        keys = layout.layer_shards(run.path, layer, block, info.dtype)
        for number, (key, length) in enumerate(zip(keys, lengths, strict=False)):
            said = wanted[some] if number == 0 else None
            checksums[some, number] = _stored(objects, key, run.block_length, length, slots, said)

    each(objects, read, np.unique(blocks).tolist())
    return Column(records=np.where(have, wanted, np.uint64(0)), checksums=checksums)


def _stored(
    objects: Objects, key: str, block_length: int, image_bytes: int | None, slots: Sequence[int], said: Record | None
) -> npt.NDArray[np.uint32]:
    """The crc32c that a shard keeps of the images in ``slots``, (n,); 0 where it does not say.

    Args:
        objects: where the store lies.
        key: of the shard.
        block_length: images in a block.
        image_bytes: of one image in this shard; None: they are packed.
        slots: places of the images in the block.
        said: (n,) what each was computed from, for a shard that says so itself.
    """

    def read(snapshot: Snapshot) -> bytes:
        found = bytearray(shard.CRC_BYTES * len(slots))
        if said is None:
            assert image_bytes is not None, "scales are never packed"
            entries = shard.read_entries(snapshot, block_length, image_bytes)[slots]
        else:
            index = shard.read_index(snapshot, key, block_length, image_bytes)
            entries = np.where((index.label[slots] == said)[:, None], index.entries[slots], np.uint64(shard.ABSENT))
        # A packed map's own crc32c stands behind that of its frame.
        back = 0 if image_bytes is None else shard.CRC_BYTES
        places = [(n, at + size - back) for n, (at, size) in enumerate(entries.tolist()) if at != shard.ABSENT]
        _gather(snapshot, places, found)
        return bytes(found)

    try:
        return np.frombuffer(objects.read_with(key, read), dtype="<u4").astype(np.uint32)
    except (NotFoundError, CorruptError):
        return np.zeros(len(slots), dtype=np.uint32)


def _gather(snapshot: Snapshot, places: Sequence[tuple[int, int]], found: bytearray) -> None:
    """Copy the checksum at each (number, offset) to its place in ``found``."""
    if snapshot.size_bytes <= _WHOLE_BYTES:
        data = snapshot.read(0, snapshot.size_bytes)
        for number, offset in places:
            found[4 * number : 4 * number + 4] = data[offset : offset + 4]
    else:
        view = memoryview(found)
        snapshot.read_many([(offset, [view[4 * number : 4 * number + 4]]) for number, offset in places])

"""One layer's part of a block: its shard first, then the record that says so.

What `committed` says is true at every moment, whatever is cut off where. The durable steps, in order:

1. Rows whose record would become untrue are set to 0 in the record, the snapshot of complete blocks
   withdrawn before (`featstore.store.completeness`). These are rows that hold another
   image's features (stale) or broken bytes, and are about to be replaced or dropped.
2. The shard is put: temporary file, fsync, rename, fsync of the folder. That of the scales, where maps
   are int8, follows in the same way.
3. The record is put with the digests of what the shard now holds: temporary file, fsync, rename. The folder
   is synced later (`Objects.settle`).

Why that may wait: until then a power cut may undo the rename, and it undoes it whole, as the bytes of the new
record were durable before. The record is then the one of before step 3: it names fewer rows than the shard
holds, and none that it does not, because step 1 does sync the folder before the shard is touched. So a block
may be computed again, and nothing is ever wrong. What says that blocks are complete without looking at
their records (`featstore.store.completeness`) syncs the folders before it is written.

Cut before 1: nothing happened. Between 1 and 2: some rows that nobody could read are now absent.
Between 2 and 3: the shard holds rows that the record calls absent, which are never read; every row
that the record does name has the same bytes in the new shard, as they were copied. After 3: done.

Can a row be replaced by other bytes while the record still claims the old digest? Only without step 1:
the record says digest A, the shard is replaced by the features of B, the process dies, and whoever
turns the image back to A (or still holds the table of before) reads B's features as A's. Hence step
1. And a row that is valid already is never replaced: its bytes are kept even if the caller brings
them again, so two processes that computed the same block on different devices (rows agree to 1e-3
only) cannot change what a reader has seen. So bytes under an unchanged record value never change.

The lock makes this read-merge-write one step among threads and processes of a machine. Across
machines two extractions are kept off each other's blocks by leases (`featstore.store.leases`); should one outlive
its lease, the last writer of a block wins as a whole, and `_stands` puts again what the other's shard left out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import CorruptError, NotFoundError
from featstore.store import completeness, layout, packing, scales, shard
from featstore.store.committed import REMEDY, Record, read_record, write_record
from featstore.store.objects import Objects
from featstore.store.precision import Scales

_log = logging.getLogger(__name__)

_TRIES = 3


def write_layer_block(
    objects: Objects,
    run: str,
    layer: str,
    block: int,
    *,
    wanted: Record,
    maps: Mapping[int, npt.NDArray[Any]],
    image_bytes: int,
    map_scales: Mapping[int, Scales] | None = None,
    packed: bool = False,
) -> int:
    """Merge ``maps`` into a block of a layer and commit them.

    Args:
        objects: where the store lies.
        run: path of the run.
        layer: name of the layer.
        block: number of the block.
        wanted: (block length,) digests of the images that the rows of this block stand for now.
        maps: new maps by place in the block, each C-contiguous (C, H, W) in the layer's dtype.
        image_bytes: bytes of one map.
        map_scales: (C,) of each of ``maps``, where the layer is int8.
        packed: whether maps lie behind zstd.

    Returns:
        Bytes written; 0 if every one of ``maps`` was committed and sound already.

    Raises:
        CorruptError: if valid rows of this block that are to be kept are broken.
        StorageError: if the disk fails or refuses; the record then still tells the truth.
    """
    written = 0
    for _ in range(_TRIES):
        with objects.lock(f"{run}/{layer}/{block}"):
            fresh, more = _merge(
                objects,
                run,
                layer,
                block,
                wanted,
                maps,
                image_bytes=image_bytes,
                map_scales=map_scales,
                packed=packed,
            )
        written += more
        if _stands(objects, run, layer, block, wanted, fresh):
            break
    return written


def _merge(
    objects: Objects,
    run: str,
    layer: str,
    block: int,
    wanted: Record,
    maps: Mapping[int, npt.NDArray[Any]],
    image_bytes: int,
    map_scales: Mapping[int, Scales] | None,
    *,
    packed: bool,
) -> tuple[list[int], int]:
    """One turn of `write_layer_block`: places of the rows that were put, and bytes written."""
    record = read_record(objects, run, layer, block, len(wanted))
    shard_key = layout.shard_key(run, layer, block)
    images, seals, wrong = _read_old(objects, shard_key, record, image_bytes, packed=packed)
    kept: dict[int, Scales] = {}
    if map_scales:
        scales_key = layout.scales_shard_key(run, layer, block)
        channels = len(next(iter(map_scales.values())))
        seals = seals or {slot: shard.checksum(image) for slot, image in images.items()}
        kept = _read_scales(objects, scales_key, len(record), channels, seals, wrong)
        images = {slot: images[slot] for slot in kept}
    broken = [slot for slot in wrong if slot not in maps and record[slot] == wanted[slot]]
    if broken:
        raise CorruptError(f"{shard_key} is damaged: place {broken[0]} of the block: {wrong[broken[0]]}", hint=REMEDY)
    # Rows of an earlier state of an image stay where they are sound: they are true, and valid
    # again should the image come back.
    fresh = [slot for slot in maps if slot not in images or record[slot] != wanted[slot]]
    if not fresh:
        return [], 0
    after = np.zeros_like(record)
    after[list(images)] = record[list(images)]
    after[fresh] = wanted[fresh]
    for slot in fresh:
        image = shard.byte_view(maps[slot])
        images[slot] = packing.pack(image) if packed else image
        if packed or map_scales:
            seals[slot] = shard.checksum(image)
    untrue = (record != 0) & (record != after)
    untrue[list(wrong)] = True
    if wrong:
        _log.warning("%s/%s block %d: %d broken rows are replaced or dropped", run, layer, block, len(wrong))
    written = 0
    if untrue.any():
        with completeness.withdrawn(objects, run):
            written += write_record(objects, run, layer, block, np.where(untrue, np.uint64(0), record))
    encoded = packing.encode(images, seals, after, shard_key) if packed else shard.encode(images, after, shard_key)
    written += objects.put_parts(shard_key, encoded)
    if map_scales:
        kept |= {slot: map_scales[slot] for slot in fresh}
        written += objects.put(scales_key, *scales.encode(kept, seals, len(record)))
    return fresh, written + write_record(objects, run, layer, block, after, settled=False)


def _stands(objects: Objects, run: str, layer: str, block: int, wanted: Record, fresh: list[int]) -> bool:
    """Whether rows that were just put are there, as far as the record says that they are.

    Where nothing locks a block, somebody else may have put a shard without them between our two steps.
    """
    if not fresh or objects.lock_reaches_all:
        return True
    record = read_record(objects, run, layer, block, len(wanted))
    claimed = [slot for slot in fresh if record[slot] == wanted[slot]]
    key = layout.shard_key(run, layer, block)
    try:
        label = objects.read_with(key, lambda snapshot: shard.read_index(snapshot, key, len(wanted), None)).label
    except (NotFoundError, CorruptError):
        return not claimed
    return all(label[slot] == wanted[slot] for slot in claimed)


def _read_old(
    objects: Objects, key: str, record: Record, image_bytes: int, *, packed: bool
) -> tuple[dict[int, memoryview], dict[int, bytes], dict[int, str]]:
    """The committed rows of a shard that are sound, as they lie there, and what is wrong with the others, by place.

    Of packed rows the crc32c of their maps come with them.
    """
    slots = np.flatnonzero(record).tolist()
    if not slots:
        return {}, {}, {}
    try:
        if packed:
            return packing.read_packed(objects, key, record, slots)
        rows = np.empty((len(slots), image_bytes), dtype=np.uint8)
        wrong = shard.read(objects, key, record, slots, [shard.byte_view(row) for row in rows])
    except NotFoundError:
        return {}, {}, dict.fromkeys(slots, "its shard is gone")
    except CorruptError as error:
        return {}, {}, dict.fromkeys(slots, str(error))
    return {s: shard.byte_view(row) for s, row in zip(slots, rows, strict=True) if s not in wrong}, {}, wrong


def _read_scales(
    objects: Objects,
    key: str,
    block_length: int,
    channels: int,
    seals: Mapping[int, bytes],
    wrong: dict[int, str],
) -> dict[int, Scales]:
    """The scales of the rows whose maps have the crc32c ``seals``; rows that have none are entered in ``wrong``."""
    kept = {slot: np.empty(channels, dtype=np.float32) for slot in seals}
    found = scales.read(objects, key, block_length, list(seals), list(seals.values()), list(kept.values()))
    wrong.update(found)
    return {slot: row for slot, row in kept.items() if slot not in found}


def uncommit(
    objects: Objects, run: str, layer: str, block: int, block_length: int, doomed: Mapping[int, int] | None
) -> None:
    """Make rows of a block absent, so that the next extraction computes them.

    Args:
        objects: where the store lies.
        run: path of the run.
        layer: name of the layer.
        block: number of the block.
        block_length: images in a block.
        doomed: by place in the block, the record value that was found wrong; a place that holds
            another value by now was rewritten meanwhile and stays. None: the whole record, if it is
            still broken.
    """
    with objects.lock(f"{run}/{layer}/{block}"):
        try:
            record = read_record(objects, run, layer, block, block_length)
        except CorruptError:
            record = np.zeros(block_length, dtype=np.uint64)
        for slot, value in (doomed or {}).items():
            if int(record[slot]) == value:
                record[slot] = 0
        with completeness.withdrawn(objects, run):
            write_record(objects, run, layer, block, record)

"""One layer's part of a block: its shard first, then the record that says so.

What `committed` says is true at every moment, whatever is cut off where. The durable steps, in order:

1. Rows whose record would become untrue are set to 0 in the record. These are rows that hold another
   image's features (stale) or broken bytes, and are about to be replaced or dropped.
2. The shard is put: temporary file, fsync, rename, fsync of the folder.
3. The record is put, in the same way, with the digests of what the shard now holds.

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
machines the last writer of a block wins as a whole, shard and record apart; leases will prevent that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import CorruptError, NotFoundError
from featstore.store import layout, shard
from featstore.store.committed import REMEDY, Record, read_record, write_record
from featstore.store.objects import Objects

_log = logging.getLogger(__name__)


def write_layer_block(
    objects: Objects,
    run: str,
    layer: str,
    block: int,
    *,
    wanted: Record,
    maps: Mapping[int, npt.NDArray[Any]],
    image_bytes: int,
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

    Returns:
        Bytes written; 0 if every one of ``maps`` was committed and sound already.

    Raises:
        CorruptError: if valid rows of this block that are to be kept are broken.
        StorageError: if the disk fails or refuses; the record then still tells the truth.
    """
    with objects.lock(f"{run}/{layer}/{block}"):
        record = read_record(objects, run, layer, block, len(wanted))
        old, wrong = _read_old(objects, layout.shard_key(run, layer, block), record, image_bytes)
        broken = [slot for slot in wrong if slot not in maps and record[slot] == wanted[slot]]
        if broken:
            key = layout.shard_key(run, layer, block)
            raise CorruptError(f"{key} is damaged: place {broken[0]} of the block: {wrong[broken[0]]}", hint=REMEDY)
        # Rows of an earlier state of an image stay where they are sound: they are true, and valid
        # again should the image come back.
        images = {slot: shard.byte_view(old[slot]) for slot in old}
        after = np.where([slot in old for slot in range(len(record))], record, np.uint64(0))
        fresh = [slot for slot in maps if slot not in old or record[slot] != wanted[slot]]
        if not fresh:
            return 0
        for slot in fresh:
            images[slot] = shard.byte_view(maps[slot])
            after[slot] = wanted[slot]
        untrue = (record != 0) & (record != after) | np.isin(np.arange(len(record)), list(wrong))
        if wrong:
            _log.warning("%s/%s block %d: %d broken rows are replaced or dropped", run, layer, block, len(wrong))
        written = 0
        if untrue.any():
            written += write_record(objects, run, layer, block, np.where(untrue, np.uint64(0), record))
        written += objects.put(layout.shard_key(run, layer, block), *shard.encode(images, len(record)))
        return written + write_record(objects, run, layer, block, after)


def _read_old(
    objects: Objects, key: str, record: Record, image_bytes: int
) -> tuple[dict[int, npt.NDArray[np.uint8]], dict[int, str]]:
    """The committed rows of a shard that are sound, and what is wrong with the others, by place."""
    slots = np.flatnonzero(record).tolist()
    if not slots:
        return {}, {}
    rows = np.empty((len(slots), image_bytes), dtype=np.uint8)
    try:
        with objects.open(key) as snapshot:
            index = shard.read_index(snapshot, len(record), image_bytes)
            wrong = shard.read_images(snapshot, index, slots, [shard.byte_view(row) for row in rows])
    except NotFoundError:
        wrong = dict.fromkeys(slots, "its shard is gone")
    except CorruptError as error:
        wrong = dict.fromkeys(slots, str(error))
    return {slot: row for slot, row in zip(slots, rows, strict=True) if slot not in wrong}, wrong


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
        write_record(objects, run, layer, block, record)

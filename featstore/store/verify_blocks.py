"""Checking the features of a layer, block by block: records, maps, scales, and that maps are finite."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from featstore.errors import CorruptError, NotFoundError
from featstore.store import layout, packing, scales, shard
from featstore.store.committed import REMEDY, Record, as_records, read_record
from featstore.store.findings import Findings
from featstore.store.memory import room_for
from featstore.store.parallel import at_once
from featstore.store.run import Run
from featstore.store.write import uncommit

_TRIES = 5
_NAMED_KEYS = 3
_STEP_BYTES = 64 << 20
"""Bytes of maps that are read at once."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Found:
    """What one block of a layer holds."""

    record: Record
    """(block length,)"""
    damaged: CorruptError | None = None
    """What is wrong with the record itself, which is then given as zeros."""
    wrong: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """What is wrong with rows, by place in the block."""
    nonfinite: tuple[int, ...] = ()
    """Places of maps that hold NaN or infinities."""


def check_layer(run: Run, layer: str, findings: Findings, advance: Callable[[], None]) -> Record:
    """Read all that is committed of a layer, and uncommit what is broken if that is asked for.

    Args:
        run: the run.
        layer: name of the layer.
        findings: takes what is found.
        advance: called once a block.

    Returns:
        (blocks * block length,) what is there and sound, computed from what.
    """
    record = np.zeros(run.n_blocks * run.block_length, dtype=np.uint64)
    found: dict[int, _Found] = {}
    for block, one in _blocks(run, layer):
        record[block * run.block_length :][: run.block_length] = one.record
        if one.damaged is not None or one.wrong or one.nonfinite:
            found[block] = one
        findings.bytes += int((one.record != 0).sum()) * run.layers[layer].stored_bytes
        advance()
    for block, one in sorted(found.items()):
        _report(run, layer, block, one, findings)
        bad = [block * run.block_length + slot for slot in (*one.wrong, *one.nonfinite)]
        record[bad] = 0
    _count(run, layer, record[: run.n_images], findings)
    return record


def _blocks(run: Run, layer: str) -> Iterator[tuple[int, _Found]]:
    """All blocks of a layer, as they are done; several at once where reading them is requests."""
    objects = run.dataset.objects
    if objects.parallel_reads <= 1:
        for block in range(run.n_blocks):
            yield block, _check(run, layer, block)
        return
    size_bytes = min(_STEP_BYTES, run.block_length * run.layers[layer].stored_bytes)
    yield from at_once(
        lambda block: _check(run, layer, block),
        range(run.n_blocks),
        size=lambda _: size_bytes,
        count=objects.parallel_reads,
    )


def _check(run: Run, layer: str, block: int) -> _Found:
    objects = run.dataset.objects
    for left in reversed(range(_TRIES)):
        try:
            record = read_record(objects, run.path, layer, block, run.block_length)
        except CorruptError as error:
            if left == _TRIES - 1 and objects.doubt(layout.record_key(run.path, layer, block)):
                continue
            return _Found(record=np.zeros(run.block_length, dtype=np.uint64), damaged=error)
        wrong, nonfinite = _read(run, layer, block, record)
        if not wrong or not left:
            break
        # A writer may be at work on this very block, or a cache have kept something broken: once more, then.
        doubts = [objects.doubt(key) for key in _shards(run, layer, block)]
        again = read_record(objects, run.path, layer, block, run.block_length)
        if np.array_equal(record, again) and left < _TRIES - 1 and not any(doubts):
            break
    return _Found(record=record, wrong=wrong, nonfinite=tuple(nonfinite))


def _shards(run: Run, layer: str, block: int) -> tuple[str, ...]:
    return layout.layer_shards(run.path, layer, block, run.layers[layer].dtype)


def _read(run: Run, layer: str, block: int, record: Record) -> tuple[dict[int, str], list[int]]:
    """Read what ``record`` names: what is wrong with which, and those that are not finite."""
    info = run.layers[layer]
    slots = np.flatnonzero(record).tolist()
    step = max(1, _STEP_BYTES // info.image_bytes)
    wrong: dict[int, str] = {}
    nonfinite: list[int] = []
    for first in range(0, len(slots), step):
        some = slots[first : first + step]
        rows = room_for((len(some), *info.shape), info.dtype)
        found = _read_some(run, layer, block, record, some, rows)
        wrong |= found
        if info.dtype.kind == "f":
            sound = zip(some, rows, strict=True)
            nonfinite += [slot for slot, row in sound if slot not in found and not np.isfinite(row).all()]
    return wrong, nonfinite


def _read_some(
    run: Run, layer: str, block: int, record: Record, slots: list[int], rows: np.ndarray[tuple[int, ...], np.dtype]
) -> dict[int, str]:
    objects, info = run.dataset.objects, run.layers[layer]
    wrong: dict[int, str]
    try:
        keys = _shards(run, layer, block)
        targets = [shard.byte_view(row) for row in rows]
        wrong = (packing if run.compressed else shard).read(objects, keys[0], record, slots, targets)
        if info.dtype == layout.DTYPES["int8"]:
            found = np.empty((len(slots), info.shape[0]), dtype=np.float32)
            seals = [shard.checksum(target) for target in targets]
            wrong = scales.read(objects, keys[1], run.block_length, slots, seals, list(found)) | wrong
    except NotFoundError:
        return dict.fromkeys(slots, "the shard is gone")
    except CorruptError as error:
        return dict.fromkeys(slots, str(error))
    return wrong


def _report(run: Run, layer: str, block: int, found: _Found, findings: Findings) -> None:
    """Say what is wrong with one block, and uncommit it if that is asked for."""
    objects, key = run.dataset.objects, layout.shard_key(run.path, layer, block)

    def drop(slots: Mapping[int, int] | None) -> None:
        uncommit(objects, run.path, layer, block, run.block_length, slots)

    if found.damaged is not None:
        findings.broken(found.damaged, lambda: drop(None))
        return
    outcome = "uncommitted, the next extract recomputes it" if findings.repair else None
    for reason in dict.fromkeys(found.wrong.values()):
        some = [slot for slot in found.wrong if found.wrong[slot] == reason]
        findings.corrupt.append(f"{key} at {_keys(run, block, some)}: {reason}; {outcome or REMEDY}")
    if found.nonfinite:
        hint = outcome or "the next extract computes it anew; `featstore verify --repair` makes it absent"
        findings.nonfinite.append(f"{key} at {_keys(run, block, list(found.nonfinite))}: NaN or inf; {hint}")
    if findings.repair:
        doomed = [*found.wrong, *found.nonfinite]
        drop({slot: int(found.record[slot]) for slot in doomed})
        findings.repaired += len(doomed)


def _keys(run: Run, block: int, slots: list[int]) -> str:
    rows = [block * run.block_length + slot for slot in slots]
    keys = run.dataset.samples.keys
    names = [repr(keys[row]) if row < len(keys) else f"row {row}" for row in rows[:_NAMED_KEYS]]
    return ", ".join(names) + (f" and {len(rows) - len(names)} more" if len(rows) > len(names) else "")


def _count(run: Run, layer: str, record: Record, findings: Findings) -> None:
    """Count what a layer lacks; ``record`` (N,) holds zeros for what is broken."""
    absent = int((record == 0).sum())
    stale = int(((record != 0) & (record != as_records(run.dataset.samples.digest_bytes(0, run.n_images)))).sum())
    if absent or stale:
        parts = [f"{n} {what}" for n, what in ((absent, "absent"), (stale, "stale")) if n]
        findings.incomplete.append(f"{run.path}/{layer}: {' and '.join(parts)} of {run.n_images} images")

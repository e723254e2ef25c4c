"""Blocks on their way from one store to another: read and checked, written and committed, several at once.

Shapes: N images of the source's sample table, n images of a block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from featstore.errors import CorruptError, NotCommittedError
from featstore.store.committed import as_records
from featstore.store.compare import DatasetLack, Mask, RunLack, in_words
from featstore.store.dataset import StoredDataset
from featstore.store.leases import TTL_SECONDS, Holder, Keeper, acquire
from featstore.store.parallel import at_once
from featstore.store.read import LayerReader, Rows
from featstore.store.run import Run

_PATIENCE_SECONDS = TTL_SECONDS
"""How long blocks that somebody else is writing are waited for, once all others are copied."""
_LOOK_AGAIN_SECONDS = 1.0

Advance = Callable[[int], None]


@dataclasses.dataclass(slots=True, kw_only=True)
class RunCopy:
    """What became of one run."""

    lack: RunLack
    copied: int = 0
    """Blocks of the target that were written, a block counted once a layer."""
    bytes: int = 0
    """Bytes of features that were copied."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """What was not copied, and why."""
    digests: tuple[str, str] | None = None
    """Of the source and of the target, of all images that the source has."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """What one block of the target lacks in one layer."""

    reader: LayerReader
    """Of the source's layer; the images that it reads are those that the target knows."""
    rows: Rows
    """(n,) places of the images in the source."""
    places: Rows
    """(n,) their places in the target, ascending."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """What one block of the target lacks."""

    copy: RunCopy
    target: Run
    block: int
    parts: tuple[_Part, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(map(self._bytes, self.parts))

    @property
    def part_bytes(self) -> int:
        """Bytes of the largest part: they are held one after the other."""
        return max(map(self._bytes, self.parts))

    def _bytes(self, part: _Part) -> int:
        return len(part.rows) * self.target.layers[part.reader.layer].stored_bytes


@dataclasses.dataclass(slots=True, kw_only=True)
class _Done:
    """What became of a piece."""

    written: int = 0
    """Layers."""
    bytes: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    holder: Holder | None = None
    """Who is writing the block, which was therefore left alone."""


def pieces_of(copy: RunCopy, stored: StoredDataset, lack: DatasetLack) -> Iterator[Piece]:
    """The pieces of one run, in the order of the target's blocks."""
    run, layers = copy.lack.run, copy.lack.layers
    if not copy.lack.bytes_todo:
        return
    target = stored.adopt(run, list(layers))
    places = stored.rows(run.dataset.samples.keys)
    wanted = np.append(as_records(stored.samples.digest_bytes(0, len(stored.samples))), np.uint64(0))[places]
    of_block: dict[int, list[_Part]] = defaultdict(list)
    for layer, one in layers.items():
        changed = one.todo & (wanted != lack.wanted)
        if changed.any():
            copy.problems.append(f"{run.path}/{layer}: {int(changed.sum())} images changed in the target meanwhile")
        reader = dataclasses.replace(run.reader(layer), wanted=lack.wanted)
        rows = np.flatnonzero(one.todo & ~changed)
        rows = rows[np.argsort(places[rows], kind="stable")]
        blocks = places[rows] // target.block_length
        for part in np.split(rows, np.flatnonzero(np.diff(blocks)) + 1):
            if len(part):
                number = int(places[part[0]]) // target.block_length
                of_block[number].append(_Part(reader=reader, rows=part, places=places[part]))
    for block in sorted(of_block):
        yield Piece(copy=copy, target=target, block=block, parts=tuple(of_block[block]))


def _copy(piece: Piece, keeper: Keeper) -> _Done:
    """Copy one piece, unless somebody else is writing that block."""
    done = _Done()
    # Without locks, as in a bucket, two who merge rows into one block at once would lose one's rows.
    lease = acquire(piece.target.dataset.objects, piece.target.path, piece.block)
    if isinstance(lease, Holder):
        done.holder = lease
        return done
    keeper.keep(lease)
    try:
        for part in piece.parts:
            _copy_part(piece, part, done)
    finally:
        keeper.release(lease)
    return done


def _copy_part(piece: Piece, part: _Part, done: _Done) -> None:
    """Copy one layer's rows; a block of the source that is damaged, or gone meanwhile, is left out and named."""
    try:
        _put(piece, part, np.ones(len(part.rows), dtype=np.bool_), done)
    except (CorruptError, NotCommittedError):
        blocks = part.rows // part.reader.block_length
        for block in np.unique(blocks):
            try:
                _put(piece, part, blocks == block, done)
            except (CorruptError, NotCommittedError) as error:
                done.problems.append(in_words(error))


def _put(piece: Piece, part: _Part, some: Mask, done: _Done) -> None:
    """Copy ``some`` (n,) of a part's rows."""
    maps = part.reader.stored(part.rows[some])
    try:
        written = piece.target.write_block(piece.block, part.places[some].tolist(), {part.reader.layer: maps})
    except CorruptError as error:
        # The rows that the target has in this block are damaged, which says nothing about the source's.
        url = piece.target.dataset.objects.url
        done.problems.append(f"{error}; run `featstore verify --repair --store {url}`, then copy again")
    else:
        done.written += bool(written)
        done.bytes += maps.nbytes if written else 0


def copy_all(pieces: Iterable[Piece], keeper: Keeper, count: int, advance: Advance) -> None:
    """Copy pieces, ``count`` at once; those that somebody else is writing come last, and are waited for."""
    patient_until: float | None = None
    while True:
        later: list[Piece] = []
        outcomes = at_once(lambda one: _copy(one, keeper), pieces, size=lambda one: one.part_bytes, count=count)
        # Closed at once whatever happens: what is under way has ended before its leases are given back.
        with contextlib.closing(outcomes):
            for piece, done in outcomes:
                if done.holder is not None and (patient_until is None or time.monotonic() < patient_until):
                    later.append(piece)
                    continue
                piece.copy.copied += done.written
                piece.copy.bytes += done.bytes
                piece.copy.problems += done.problems
                if done.holder is not None:
                    place = f"{piece.target.path} block {piece.block}"
                    piece.copy.problems.append(f"{place} is being written by {done.holder}; run the same command again")
                advance(piece.size_bytes)
        if not later:
            return
        patient_until = patient_until or time.monotonic() + _PATIENCE_SECONDS
        time.sleep(_LOOK_AGAIN_SECONDS)
        pieces = later

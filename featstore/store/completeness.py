"""Which blocks of a run are complete, in one object, so that a plan need not look at every record.

``catalog/<run>.complete`` holds, for each layer and block, a digest of the committed record as it was when every
image of the block was there; 0 where some were not. It is a snapshot: a block counts as complete only if that digest
is the one of today's sample table, so images that were added or changed since are looked up singly, as are blocks that
it does not call complete.

What it must never do is call a block complete that is not, as that block would then be neither computed nor readable.
So ``catalog/<run>.mark`` is replaced before anything is uncommitted and once more after that, and a snapshot names the
mark that was there before the records were read that it is made from: where the two differ, it counts for nothing,
whenever it was written and whoever dies between which steps. Between its two replacements the mark says that rows are
being uncommitted, and no snapshot is made from what is read then. If the process that says so is gone, that is over
at once where it can be seen, and after ten minutes elsewhere.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from featstore.errors import CorruptError, IncompatibleError, NotFoundError
from featstore.store import layout, metadata, partial
from featstore.store.committed import Record
from featstore.store.objects import Objects

BlockDigests = npt.NDArray[np.uint64]
"""(blocks,): digest of a block's complete record, 0 where it is not complete."""

PATIENCE_SECONDS = 600.0
"""Time for which rows count as being uncommitted if nobody says that they are."""


def block_digests(record: Record, block_length: int) -> BlockDigests:
    """A digest of each block's part of ``record``, (N,) uint64; never 0."""
    data = record.astype("<u8").tobytes()
    step = 8 * block_length
    parts = [hashlib.sha256(data[start : start + step]).digest()[:8] for start in range(0, len(data), step)]
    digests = np.frombuffer(b"".join(parts), dtype="<u8").astype(np.uint64)
    digests[digests == 0] = 1
    return digests


def read(objects: Objects, run: str) -> dict[str, BlockDigests]:
    """What the snapshot of the run at path ``run`` says, by layer; nothing if there is none that counts."""
    try:
        mark, blocks = load(objects, run)
        # The mark is read after the snapshot, which was true at that moment if they agree.
        return blocks if _mark(objects, run).name == mark else {}
    except (NotFoundError, CorruptError, IncompatibleError):
        return {}


def load(objects: Objects, run: str) -> tuple[str, dict[str, BlockDigests]]:
    """The mark that a snapshot names, and what it says by layer, whether or not it counts.

    Raises:
        NotFoundError: if there is none.
        CorruptError, IncompatibleError: if it is damaged, or of another format.
    """
    key = snapshot_key(run)
    document = metadata.read(objects, key)
    try:
        if document["path"] != run or not isinstance(document["mark"], str):
            raise ValueError  # noqa: TRY301
        return document["mark"], {
            str(layer): np.frombuffer(base64.b64decode(text, validate=True), dtype="<u8").astype(np.uint64)
            for layer, text in document["blocks"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError, binascii.Error):
        raise CorruptError(f"{key} does not say which blocks are complete", hint=metadata.remedy(key)) from None


def begin(objects: Objects, run: str) -> str | None:
    """The mark that a snapshot is to name; to be read before the records. None while rows are being uncommitted."""
    try:
        mark = _mark(objects, run)
    except (CorruptError, IncompatibleError):
        return None  # `verify --repair` writes it anew.
    return None if mark.busy else mark.name


def write(objects: Objects, run: str, complete: Mapping[str, BlockDigests], mark: str) -> None:
    """Put the snapshot of a run.

    Args:
        objects: where the store lies.
        run: path of the run.
        complete: digests of complete blocks, by layer, of records that a power cut cannot take any more.
        mark: what `begin` gave before the records were read that ``complete`` is made from.
    """
    blocks = {layer: base64.b64encode(digests.astype("<u8").tobytes()).decode() for layer, digests in complete.items()}
    document = {"format": layout.FORMAT, "path": run, "mark": mark, "blocks": blocks}
    metadata.write(objects, snapshot_key(run), document)


@contextlib.contextmanager
def withdrawn(objects: Objects, run: str) -> Iterator[None]:
    """No snapshot of a run counts from now on; for as long as its rows are being uncommitted, none is made."""
    _replace_mark(objects, run, until=time.time() + PATIENCE_SECONDS)
    yield
    _replace_mark(objects, run, until=0.0)


def clear(objects: Objects, run: str) -> None:
    """Withdraw the snapshot of a run for good, and delete it."""
    _replace_mark(objects, run, until=0.0)
    objects.delete(snapshot_key(run))


def snapshot_key(run: str) -> str:
    """Key of a run's snapshot."""
    return f"{layout.CATALOG}/{run.replace('/', '~')}.complete"


def mark_key(run: str) -> str:
    """Key of a run's mark."""
    return f"{layout.CATALOG}/{run.replace('/', '~')}.mark"


def check_mark(objects: Objects, run: str) -> None:
    """Raise CorruptError or IncompatibleError if the mark of a run is damaged; there need not be one."""
    _mark(objects, run)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    """What the mark of a run says."""

    name: str = ""
    """Another one whenever it is replaced; empty if nothing of the run was ever uncommitted."""
    until: float = 0.0
    """Unix time in seconds until which rows may be being uncommitted; 0: they are not."""
    place: str = ""
    pid: int = 0
    started: int = 0
    """Who says so, as in `featstore.store.partial`."""

    @property
    def busy(self) -> bool:
        """Whether rows may be being uncommitted now."""
        # A clock that is wrong must not keep a run without a snapshot for ever.
        if not time.time() < self.until < time.time() + 2 * PATIENCE_SECONDS:
            return False
        return self.place != partial.place() or partial.lives(self.pid, self.started)


_FIELDS: Mapping[str, type] = {"name": str, "until": float, "place": str, "pid": int, "started": int}


def _mark(objects: Objects, run: str) -> _Mark:
    """The mark of a run.

    Raises:
        CorruptError, IncompatibleError: if it is damaged, or of another format.
    """
    key = mark_key(run)
    try:
        document = metadata.read(objects, key)
    except NotFoundError:
        return _Mark()
    fields = {name: document.get(name) for name in _FIELDS}
    if document.get("path") != run or not all(isinstance(fields[name], kind) for name, kind in _FIELDS.items()):
        raise CorruptError(f"{key} is no mark of a run", hint=metadata.remedy(key))
    return _Mark(**fields)  # type: ignore[arg-type]


def _replace_mark(objects: Objects, run: str, *, until: float) -> None:
    pid = os.getpid()
    mark = _Mark(name=uuid.uuid4().hex, until=until, place=partial.place(), pid=pid, started=partial.started(pid))
    metadata.write(objects, mark_key(run), {"format": layout.FORMAT, "path": run, **dataclasses.asdict(mark)})

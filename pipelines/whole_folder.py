"""Folders that are whole or not there: made under another name beside the place, and renamed when all is written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from featstore.store import partial
from featstore.whole_file import sync_folder

_REPLACED = ".replaced"
_NAME_CHARS = 30


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new, empty folder that durably becomes ``path`` when the context is left, and is deleted by an exception.

    What processes of this machine that were killed left unfinished for the same ``path`` is deleted.

    Args:
        path: what it becomes; it must not be there, or be an empty folder.
        replace: whether a folder with content may be there; it is then removed, once the new one is whole.

    Raises:
        OSError: if the disk fails or refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    prefix = f".{path.name[:_NAME_CHARS]}-{digest}."
    _sweep(path, prefix)
    unfinished = path.with_name(prefix + partial.new_name())
    unfinished.mkdir()
    try:
        yield unfinished
        _sync(unfinished)
        if replace and path.exists():
            _replace(path, unfinished)
        else:
            unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _replace(path: Path, new: Path) -> None:
    # A folder cannot be renamed over another that has content. Killed between the two, the old one stays beside.
    old = new.with_name(new.name.removesuffix(partial.SUFFIX) + _REPLACED)
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make everything in ``folder`` durable."""
    for place, _, names in os.walk(folder):
        for name in names:
            with (Path(place) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def _sweep(path: Path, prefix: str) -> None:
    """Delete what nobody is writing any more; what cannot be deleted is left."""
    with contextlib.suppress(OSError):
        for entry in path.parent.iterdir():
            if not entry.name.startswith(prefix):
                continue
            name = entry.name.removeprefix(prefix)
            replaced = name.endswith(_REPLACED) and path.exists()
            written = name.removesuffix(_REPLACED) + partial.SUFFIX if replaced else name
            # Of an age of 0: on another machine, nobody can tell here whether it is still being written.
            if partial.abandoned(written, 0.0):
                shutil.rmtree(entry, ignore_errors=True)

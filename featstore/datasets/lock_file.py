"""``<data root>/datasets.lock``: digest and length of every archive that was fetched, so that the next one is equal.

Trust on first use: what came first is taken for right, and whatever differs from it later is refused. The file may be
copied to other machines, or kept under version control, to have the same bytes there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from featstore.errors import CorruptError, IncompatibleError
from featstore.whole_file import write_whole

NAME = "datasets.lock"
FORMAT = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Locked:
    """What an archive has to be."""

    bytes: int
    """Its length."""
    sha256: str
    """64 hex digits."""


def load(data_root: Path) -> dict[str, Locked]:
    """What is known of archives, by URL; empty where there is no such file.

    Raises:
        CorruptError: if the file is not what `add` writes.
        IncompatibleError: if a later version wrote it.
        OSError: if it cannot be read.
    """
    path = data_root / NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        document = json.loads(text)
        version = int(document["format"])
        known = {url: _locked(one) for url, one in document["archives"].items()} if version <= FORMAT else {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(
            f"{path} is damaged ({type(error).__name__}: {error})",
            hint="repair it, or delete it to trust the next downloads anew",
        ) from error
    if version > FORMAT:
        raise IncompatibleError(f"{path} is of format {version}; this version knows {FORMAT}", hint="upgrade featstore")
    return known


def _locked(value: dict[str, object]) -> Locked:
    length, digest = value["bytes"], value["sha256"]
    if not isinstance(length, int) or not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"entry {value!r}")
    return Locked(bytes=length, sha256=digest)


def add(data_root: Path, url: str, locked: Locked) -> None:
    """Write down what the archive of ``url`` is; what is there of others stays.

    Raises:
        CorruptError, IncompatibleError, OSError: as `load`.
    """
    with _alone(data_root):
        known = load(data_root)
        if known.get(url) == locked:
            return
        known[url] = locked
        document = {
            "format": FORMAT,
            "archives": {url: {"bytes": one.bytes, "sha256": one.sha256} for url, one in sorted(known.items())},
        }
        write_whole(data_root / NAME, (json.dumps(document, indent=2) + "\n").encode())


@contextlib.contextmanager
def _alone(data_root: Path) -> Iterator[None]:
    """Nobody else changes the file meanwhile; the folder itself is what is held, so nothing is left behind."""
    folder = os.open(data_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # No locks on this file system.
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)

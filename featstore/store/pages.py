"""Pages of objects kept on a local disk, bounded in bytes, shared by any number of processes.

A page is a file that is renamed into place whole and carries a checksum over its bytes and over whose
page it is, so whatever is wrong with a file (cut off, flipped, zeroed by a power cut, misplaced), it is
dropped and its bytes are fetched again. Nothing that the disk refuses is an error here: what cannot be
kept is only slower to get the next time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from crc32c import crc32c

from featstore.errors import BadRequestError, StorageError
from featstore.store import partial

_log = logging.getLogger(__name__)

_FOLDER = "featstore-pages-1"
_UNFINISHED = "unfinished"
_HEADER = struct.Struct("<4sI20sQ")
PAGE_BYTES = (1 << 20) - _HEADER.size
"""Bytes of a page, which with its header is a file of 1 MiB. Neighbours in a shard share a page, so an epoch
in any order fetches each byte once; a shard of small maps is one page, fetched whole with its first image."""
_MAGIC = b"fsp1"
_COUNT = struct.Struct("<Q")
_NAME = re.compile(r"[0-9a-f]{40}-\d+")
_KEPT_AT_EVICTION = 0.9
_PAUSE_SECONDS = 30.0
_UNIT_BYTES = 4096
"""What file systems give files a multiple of."""


class PageCache:
    """Pages by (identity of an object's state, number of the page).

    Args:
        folder: where they lie; made if it is not there. Other files in it are left alone.
        limit_bytes: bytes on disk that are never exceeded; the pages used longest ago make room.

    Raises:
        BadRequestError: if the limit is not positive.
        StorageError: if the folder cannot be one.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise BadRequestError(f"a cache of {limit_bytes} bytes; it has to be positive")
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._root = folder / _FOLDER
        self._lock = threading.Lock()
        self._paused_until = 0.0
        try:
            (self._root / _UNFINISHED).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not _is_full(error) and not self._root.is_dir():
                raise _unusable(folder, error) from error
            self._pause(error)
        partial.sweep(self._root / _UNFINISHED)

    @staticmethod
    def identity(*parts: str) -> bytes:
        """20 bytes that stand for ``parts``: all that distinguishes one state of an object from every other."""
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).digest()[:20]

    def keeps(self, length: int) -> bool:
        """Whether `store` has a chance with a page of ``length`` bytes; not for a while after the disk refused."""
        return (
            _on_disk(_HEADER.size + length) + _UNIT_BYTES <= self.limit_bytes and time.monotonic() >= self._paused_until
        )

    def load(self, identity: bytes, number: int) -> memoryview | None:
        """The bytes of page ``number``; None if they are not here as they should be."""
        path = self._path(identity, number)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        body = memoryview(data)[_HEADER.size :]
        if data[: _HEADER.size] != _header(identity, number, body):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return body

    def store(self, identity: bytes, number: int, body: memoryview) -> None:
        """Keep a page, if the disk and the limit allow it."""
        if not self.keeps(len(body)):
            return
        path = self._path(identity, number)
        temporary = self._root / _UNFINISHED / partial.new_name()
        try:
            try:
                temporary.parent.mkdir(parents=True, exist_ok=True)  # It may not have been possible before, or be gone.
                self._reserve(temporary, _on_disk(_HEADER.size + len(body)))
                with temporary.open("r+b") as stream:
                    stream.write(_header(identity, number, body))
                    stream.write(body)
                    stream.truncate()
                path.parent.mkdir(exist_ok=True)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            self._pause(error)

    def forget(self, identity: bytes) -> None:
        """Drop all pages of an object's state."""
        name = identity.hex()
        with contextlib.suppress(OSError):
            for path in (self._root / name[:2]).glob(f"{name}-*"):
                path.unlink(missing_ok=True)

    def _path(self, identity: bytes, number: int) -> Path:
        name = identity.hex()
        return self._root / name[:2] / f"{name}-{number}"

    def _pause(self, error: OSError) -> None:
        if not self._paused_until:
            _log.warning("the cache in %r keeps nothing for now: %s", str(self.folder), error.strerror)
        self._paused_until = time.monotonic() + _PAUSE_SECONDS

    def _reserve(self, temporary: Path, size_bytes: int) -> None:
        """Create a file of ``size_bytes``, of all processes one at a time, and evict where the limit is exceeded.

        It has its full length from the start, so that another process that counts meanwhile counts it.
        """
        with self._lock, self._counter() as fd:
            data = os.pread(fd, _COUNT.size, 0)
            used = _COUNT.unpack(data)[0] if len(data) == _COUNT.size else None
            if used is None or used + size_bytes > self.limit_bytes:
                used = self._evict(int(self.limit_bytes * _KEPT_AT_EVICTION) - size_bytes)
            # What dies or fails after this leaves a count that is too high, and the next eviction counts anew.
            os.pwrite(fd, _COUNT.pack(used + size_bytes), 0)
            with temporary.open("xb") as stream:
                stream.truncate(size_bytes)

    @contextlib.contextmanager
    def _counter(self) -> Iterator[int]:
        """The file that counts the bytes in use, held against other processes."""
        fd = os.open(self._root / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with contextlib.suppress(OSError):  # No locks on this file system: the bound is then approximate.
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    def _evict(self, target_bytes: int) -> int:
        """Delete the pages used longest ago until at most ``target_bytes`` are left; returns how many are."""
        partial.sweep(self._root / _UNFINISHED)
        used, pages = _UNIT_BYTES, []  # The counter's own file.
        folders = [folder.path for folder in os.scandir(self._root) if folder.is_dir(follow_symlinks=False)]
        # Unfinished ones first: a page that is renamed meanwhile is counted twice rather than not at all.
        for path in sorted(folders, key=lambda path: not path.endswith(_UNFINISHED)):
            for entry in os.scandir(path):
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    used += _on_disk(status.st_size)
                    if _NAME.fullmatch(entry.name):
                        pages.append((status.st_mtime_ns, entry.path, _on_disk(status.st_size)))
        for _, name, size_bytes in sorted(pages):
            if used <= target_bytes:
                break
            with contextlib.suppress(OSError):
                os.unlink(name)  # noqa: PTH108
                used -= size_bytes
        return used


def _on_disk(size_bytes: int) -> int:
    return -(-size_bytes // _UNIT_BYTES) * _UNIT_BYTES


def _header(identity: bytes, number: int, body: memoryview) -> bytes:
    checksum = crc32c(body, crc32c(identity + _COUNT.pack(number)))
    return _HEADER.pack(_MAGIC, checksum, identity, number)


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _unusable(folder: Path, error: OSError) -> StorageError:
    failure = StorageError(
        f"cannot keep a cache in {str(folder)!r}: {error.strerror}", hint="name another folder with --cache"
    )
    failure.exit_code = 2
    return failure

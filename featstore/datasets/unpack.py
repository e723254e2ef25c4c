"""Archives from strangers, unpacked so that they can do no harm.

Only files and folders leave an archive: links, devices and the like are refused, and so are names that lead elsewhere.
How much comes out is bounded: the bytes of all files, their number, and what is held in memory. tar files go through
Python's ``data`` filter as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gzip
import io
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, NoReturn, Protocol

from typing_extensions import override

from featstore.errors import BadRequestError, CorruptError, StorageError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
_NAME_CHARS = 1024
_HEADER_BYTES = 4096
"""What headers, names and padding of one entry of a tar file may take, on average."""
_READ_BYTES = 2**20
"""The most that is read at once. Files are read in smaller pieces; only a forged header would ask for more."""
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, UnicodeError)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an archive may hold."""

    bytes: int
    """In all of its files together."""
    entries: int
    """Files and folders."""


def unpack(archive: Path, into: Path, limits: Limits, advance: Callable[[int], None] | None = None) -> int:
    """Write all files of ``archive`` below the empty folder ``into``.

    Args:
        archive: a file with one of `SUFFIXES`.
        into: an empty folder.
        limits: what it may hold.
        advance: called with how many more bytes of the archive are done; as many as it has, in the end.

    Returns:
        How many bytes the files have.

    Raises:
        BadRequestError: for a name with another suffix.
        CorruptError: if the archive is damaged, holds what it must not, or more than it may. Files may be left in
            ``into``, and never outside.
        StorageError: if the disk fails or is full.
    """
    if not archive.name.endswith(SUFFIXES):
        raise BadRequestError(f"{archive.name!r} is no archive of a known kind; known: {', '.join(SUFFIXES)}")
    guard = _Guard(archive.name, limits)
    advance = advance or (lambda _: None)
    try:
        if archive.name.endswith(".zip"):
            _unpack_zip(archive, into, guard, advance)
        else:
            _unpack_tar(archive, into, guard, advance)
    except _DAMAGED as error:
        raise CorruptError(f"{archive.name} is damaged ({type(error).__name__}: {error})") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise StorageError(
            f"cannot unpack {archive.name} into {into}: {error.strerror or error}",
            hint="make room, or name another disk with --data-root" if full else None,
        ) from error
    return guard.total_bytes


class _Guard:
    """Looks at every entry before anything of it is written."""

    def __init__(self, archive: str, limits: Limits) -> None:
        self._archive, self._limits = archive, limits
        self._files: set[PurePosixPath] = set()
        self._entries = 0
        self.total_bytes = 0

    def admit(self, name: str, size_bytes: int | None) -> PurePosixPath:
        """The path of an entry below the folder; ``size_bytes``: None for a folder."""
        self._entries += 1
        if self._entries > self._limits.entries:
            self.refuse(f"holds more than {self._limits.entries:,} files and folders")
        path = PurePosixPath(name)
        strange = "\\" in name or "\0" in name or len(name) > _NAME_CHARS or PureWindowsPath(name).drive
        if strange or path.is_absolute() or ".." in path.parts:
            self.refuse(f"holds {name[:_NAME_CHARS]!r}, a name that leads elsewhere")
        if size_bytes is None:
            return path
        if not path.parts or path in self._files or size_bytes < 0:
            self.refuse(f"holds the file {name!r} twice, or in the place of a folder, or with less than nothing in it")
        self._files.add(path)
        self.total_bytes += size_bytes
        if self.total_bytes > self._limits.bytes:
            self.refuse(f"unpacks to more than {self._limits.bytes:,} bytes")
        return path

    @property
    def stream_bytes(self) -> int:
        """What a tar file with such entries may take, its headers and padding included."""
        return self._limits.bytes + self._limits.entries * _HEADER_BYTES

    def refuse(self, what: str) -> NoReturn:
        """End it."""
        raise CorruptError(f"{self._archive} {what}; it was not unpacked", hint="do not use it: it is not what it says")


def _unpack_zip(archive: Path, into: Path, guard: _Guard, advance: Callable[[int], None]) -> None:
    left = archive.stat().st_size
    with zipfile.ZipFile(archive) as file:
        entries = []
        for info in file.infolist():
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):  # 0: not made by Unix
                guard.refuse(f"holds {info.filename!r}, which is neither a file nor a folder")
            if info.flag_bits & 1:
                guard.refuse(f"holds {info.filename!r}, which is encrypted")
            entries.append((info, guard.admit(info.orig_filename, None if info.is_dir() else info.file_size)))
        for info, path in entries:
            target = into / path
            if info.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                # No more than `file_size` bytes come out, and their checksum is compared.
                with file.open(info) as source, target.open("xb") as out:
                    shutil.copyfileobj(source, out)
            except NotImplementedError as error:
                raise CorruptError(f"{archive.name}: {info.filename!r} cannot be unpacked: {error}") from error
            done = min(info.compress_size, left)
            left -= done
            advance(done)
    advance(left)


def _unpack_tar(archive: Path, into: Path, guard: _Guard, advance: Callable[[int], None]) -> None:
    done = 0
    with contextlib.ExitStack() as stack:
        raw: BinaryIO = stack.enter_context(archive.open("rb"))
        plain: _Readable = raw
        if not archive.name.endswith(".tar"):
            plain = stack.enter_context(gzip.GzipFile(fileobj=raw, mode="rb"))
        bounded = _Bounded(plain, guard)
        file = stack.enter_context(tarfile.open(fileobj=bounded, mode="r:"))
        while (member := file.next()) is not None:
            file.members.clear()  # type: ignore[attr-defined] # all that it has seen, which nothing here needs again
            if member.issparse() or not (member.isreg() or member.isdir()):
                guard.refuse(f"holds {member.name!r}, which is neither a file nor a folder")
            path = guard.admit(member.name, None if member.isdir() else member.size)
            if member.isdir():
                # Not as the archive says: a folder that its owner may not write could not be filled.
                (into / path).mkdir(parents=True, exist_ok=True)
            else:
                file.extract(member, into, filter="data")
            position = raw.tell()
            advance(position - done)
            done = position
        # To the end: the checksum of a compressed file is there, and an unreadable header looks like the end.
        while rest := bounded.read(_READ_BYTES):
            if rest.count(0) != len(rest):
                raise tarfile.ReadError("there is something unreadable in its middle")
        advance(archive.stat().st_size - done)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Bounded(io.RawIOBase):
    """A stream that is read from front to back, in pieces of a bounded length, and up to a bounded total."""

    def __init__(self, source: _Readable, guard: _Guard) -> None:
        self._source, self._guard = source, guard
        self._position = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _READ_BYTES:
            self._guard.refuse("has a header that is far too long")
        data = self._source.read(size)
        self._position += len(data)
        if self._position > self._guard.stream_bytes:
            self._guard.refuse(f"unpacks to more than {self._guard.stream_bytes:,} bytes")
        return data

    @override
    def tell(self) -> int:
        return self._position

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._position:
            raise tarfile.ReadError("its entries overlap")
        while self._position < offset and self.read(min(_READ_BYTES, offset - self._position)):
            pass
        return self._position

"""Objects as files below a folder of a local disk or a mounted file system.

Paths are plain strings here: pathlib takes longer to name a small file than the kernel to read it.
"""
# ruff: noqa: PTH102, PTH105, PTH106, PTH108, PTH112, PTH113, PTH116, PTH120, PTH208

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from typing_extensions import override

from featstore.errors import CorruptError, FeatstoreError, NotFoundError, StorageError
from featstore.store import hints, partial
from featstore.store.crc import crc32c_cached
from featstore.store.objects import INTERNAL, LOCKS, Objects, Snapshot, check_key, lock_number

_IOV_MAX = 1024
# Not blocking: a named pipe would wait for its other end. To files it makes no difference.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
# Not mkstemp: a store is shared, so a file's mode follows the umask.
_WRITE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_PIECE_BYTES = 256 << 10
"""Bytes copied from the page cache at once: small enough to be in the second-level cache when checksummed next."""
_WRITE_BYTES = 512 << 10
"""Bytes handed to the kernel at once. With more it fills its cache by huge pages, which take ten times as long where a
virtual machine's host has taken them back since they were last used."""
_STRETCH_BYTES = 8 << 20
"""Bytes after which the disk is asked to begin, while the next ones are copied."""
_thread_locks = tuple(threading.Lock() for _ in range(2 * LOCKS))

T = TypeVar("T")

_HINTS = {
    errno.ENOSPC: "free space on that disk, then run the same command again: what is committed stays",
    errno.EDQUOT: "your quota on that disk is used up; free space, then run the same command again",
    errno.EFBIG: "the file would exceed this process's limit (`ulimit -f`) or the file system's",
    errno.EACCES: "check the permissions of that folder, or choose another --store",
    errno.EPERM: "check the permissions of that folder, or choose another --store",
    errno.EROFS: "that disk is mounted read-only; choose another --store",
    errno.ENOTDIR: "a part of that path is a file; choose another --store",
    errno.EIO: "the disk reports errors; copy the store elsewhere and run `featstore verify` there",
}
_ABSENT = (errno.ENOENT, errno.ENOTDIR)


def storage_error(action: str, path: Path | str, error: OSError) -> StorageError:
    """What the operating system refused, as an error that says what to do about it."""
    reason = error.strerror or type(error).__name__
    hint = _HINTS.get(error.errno or 0, "check that disk, then run the same command again")
    return StorageError(f"cannot {action} {str(path)!r}: {reason}", hint=hint)


def _unopened(path: str, error: OSError) -> FeatstoreError:
    """Why a file could not be opened for reading."""
    return NotFoundError(f"there is no {path!r}") if error.errno in _ABSENT else storage_error("read", path, error)


class LocalSnapshot(Snapshot):
    """A file that is open: a later put of the same key takes its name and leaves its bytes."""

    piece_bytes = _PIECE_BYTES

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, _READ)
        try:
            self.size_bytes = _file_bytes(self._fd, path)
        except CorruptError:
            os.close(self._fd)
            raise

    @override
    def close(self) -> None:
        os.close(self._fd)

    @override
    def read_summed(self, offset: int, target: memoryview, rest: memoryview) -> int:
        crc, end = 0, len(target)
        for at in range(0, end, _PIECE_BYTES):
            piece = target[at : at + _PIECE_BYTES]
            last = at + len(piece) == end
            wanted = len(piece) + (len(rest) if last else 0)
            if self._read_once(offset + at, (piece, rest) if last else (piece,)) != wanted:
                return super().read_summed(offset, target, rest)  # Cut short by a signal, or the file ends.
            crc = crc32c_cached(piece, crc)
        return crc

    def _read_once(self, offset: int, buffers: Sequence[memoryview]) -> int:
        try:
            return os.preadv(self._fd, buffers, offset)
        except OSError as error:
            raise storage_error("read", self._path, error) from error

    @override
    def read(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as error:
            raise storage_error("read", self._path, error) from error
        return data if len(data) == length else super().read(offset, length)

    @override
    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        todo, left = buffers, sum(map(len, buffers))
        while left:
            count = self._read_once(offset, todo[:_IOV_MAX])
            if count == 0:
                raise CorruptError(f"{self._path!r} ends at byte {offset}, before what it should hold")
            offset += count
            left -= count
            if left:
                todo = _after(todo, count)


def _after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of ``buffers``, plain bytes, once ``count`` of them are done."""
    for number, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[number + 1 :]]
        count -= len(buffer)
    return []


class LocalObjects(Objects):
    """Objects as files below a folder.

    A put is temporary file, fsync, rename, fsync of the folder.

    Args:
        root: the folder.
        durable: False leaves out every fsync, for measurements only.
    """

    lock_reaches_all = True

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        super().__init__(str(root))
        self.root = root
        self.durable = durable
        self._prefix = f"{root}/"

    def _path(self, key: str) -> str:
        return self._prefix + check_key(key)

    @override
    def exists(self, key: str) -> bool:
        return os.path.isfile(self._path(key))

    @override
    def size_bytes(self, key: str) -> int:
        try:
            return os.stat(self._path(key)).st_size
        except OSError:
            return 0

    @override
    def open(self, key: str) -> LocalSnapshot:
        path = self._path(key)
        try:
            return LocalSnapshot(path)
        except OSError as error:
            raise _unopened(path, error) from None

    @override
    def read_with(self, key: str, read: Callable[[Snapshot], T]) -> T:
        snapshot = self.open(key)  # Once is enough: an open file is never replaced.
        try:
            return read(snapshot)
        finally:
            snapshot.close()

    @override
    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        path = self._path(key)
        try:
            fd = os.open(path, _READ)
        except OSError as error:
            raise _unopened(path, error) from None
        try:
            size_bytes = _file_bytes(fd, path)
            data = os.pread(fd, size_bytes, 0) if max_bytes is None or size_bytes <= max_bytes else b""
        except OSError as error:
            raise storage_error("read", path, error) from error
        finally:
            os.close(fd)
        # Too long, more than the kernel reads at once, or made shorter meanwhile: the long way says what to make of it.
        return data if len(data) == size_bytes else super().get(key, max_bytes=max_bytes)

    @override
    def names(self, folder: str) -> list[str]:
        path = self._path(folder) if folder else self.root
        try:
            return sorted(name for name in os.listdir(path) if name != INTERNAL)
        except OSError as error:
            if error.errno in _ABSENT:
                return []
            raise storage_error("list", path, error) from error

    @override
    def put(self, key: str, *buffers: bytes | memoryview, durable: bool = True) -> int:
        return self._put(key, buffers, os.replace, durable=durable)

    @override
    def put_parts(self, key: str, parts: Iterable[bytes | memoryview]) -> int:
        return self._put(key, parts, os.replace)

    @override
    def put_unsettled(self, key: str, *buffers: bytes | memoryview) -> int:
        return self._put(key, buffers, os.replace, settled=False)

    @override
    def settle(self, folder: str) -> None:
        path = self._path(folder)
        try:
            self._sync_folder(path)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise storage_error("write", path, error) from error

    @override
    def put_new(self, key: str, *buffers: bytes | memoryview, durable: bool = True) -> bool:
        if self.exists(key):
            return False
        try:
            self._put(key, buffers, _link, durable=durable)
        except FileExistsError:
            return False
        return True

    def _put(
        self,
        key: str,
        buffers: Iterable[bytes | memoryview],
        publish: Callable[[str, str], object],
        *,
        durable: bool = True,
        settled: bool = True,
    ) -> int:
        path, durable = self._path(key), durable and self.durable
        temporary = f"{self._prefix}{INTERNAL}/{partial.new_name()}"
        renamed = False
        try:
            try:
                written = self._with_folder(temporary, lambda: _write(temporary, buffers, durable=durable))
                self._with_folder(path, lambda: publish(temporary, path))
                renamed = publish is os.replace
                if durable and settled:
                    self._sync_folder(os.path.dirname(path))
            finally:
                # After a link, an error or Ctrl-C it is ours to delete.
                if not renamed:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(temporary)
        except FileExistsError:
            raise
        except OSError as error:
            raise storage_error("write", path, error) from error
        return written

    def _with_folder(self, path: str, do: Callable[[], T]) -> T:
        """``do``, which needs the folder that ``path`` is in; created if it turns out to be missing."""
        try:
            return do()
        except FileNotFoundError:
            self._make_folder(os.path.dirname(path))
        return do()

    def _make_folder(self, path: str) -> None:
        """Create ``path`` and what is missing above it, each one durable in its parent."""
        if os.path.isdir(path):
            return
        parent = os.path.dirname(path)
        self._make_folder(parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
        self._sync_folder(parent)

    def _sync_folder(self, path: str) -> None:
        if not self.durable:
            return
        fd = os.open(path, _READ | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network file systems have no fsync for folders; their renames are durable by themselves.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(fd)

    @override
    def delete(self, key: str, *, durable: bool = True) -> None:
        path = self._path(key)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            if durable:
                with contextlib.suppress(FileNotFoundError):
                    self._sync_folder(os.path.dirname(path))
        except OSError as error:
            raise storage_error("delete", path, error) from error

    @override
    def prune(self, folder: str) -> None:
        for path, _, _ in os.walk(self._path(folder), topdown=False):
            # One that somebody puts something into at this moment stays; one that is gone is created again (`_put`).
            with contextlib.suppress(OSError):
                os.rmdir(path)

    @override
    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold ``name`` among all threads and, on this machine, all processes.

        The kernel lets go of it when a process dies, however it dies. Names share a few lock files,
        so two names may also wait for each other: correct, only slower. On file systems without
        locks it holds among the threads of this process.
        """
        number = lock_number(name)
        path = f"{self._prefix}{INTERNAL}/lock-{number:02d}"
        with _thread_locks[number]:
            try:
                fd = self._with_folder(path, lambda: _open_lock(path))
            except OSError as error:
                raise storage_error("write", path, error) from error
            try:
                with contextlib.suppress(OSError):
                    fcntl.flock(fd, fcntl.LOCK_EX)
                yield
            finally:
                os.close(fd)

    @override
    def require_writable(self) -> None:
        if (self.root / INTERNAL).is_symlink():  # A stranger's: locks and unfinished files would go to another place.
            raise StorageError(
                f"{str(self.root / INTERNAL)!r} is a link, and not a folder of this store", hint="delete that link"
            )
        for path in (self.root, self.root / INTERNAL):
            if path.exists() and not os.access(path, os.W_OK | os.X_OK):
                raise storage_error("write", path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))

    @override
    def sweep(self) -> list[str]:
        return partial.sweep(self.root / INTERNAL)


def _file_bytes(fd: int, path: str) -> int:
    """Length of an open file; CorruptError if it is a folder, a pipe or a device, which a stranger's store may hold."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise CorruptError(f"{path!r} is no file")
    return status.st_size


def _open_lock(path: str) -> int:
    """A descriptor to lock; of a colleague's file that we may only read, that is enough.

    Never one behind a link: opening that for writing would create whatever it points to.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except PermissionError:
        return os.open(path, _READ | os.O_NOFOLLOW)


def _link(temporary: str, path: str) -> None:
    """Publish under a name that must be free: a link, unlike a rename, refuses one that is taken."""
    try:
        os.link(temporary, path)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        # No links here (exFAT, some network file systems): an empty file claims the name first.
        os.close(os.open(path, _WRITE_NEW, 0o666))
        os.replace(temporary, path)


def _write(path: str, buffers: Iterable[bytes | memoryview], *, durable: bool) -> int:
    """Write ``buffers`` to the new file ``path`` and return their length in bytes."""
    fd = os.open(path, _WRITE_NEW, 0o666)
    try:
        at = begun = 0
        for piece in _pieces(buffers):
            left = piece
            while left:
                count = os.writev(fd, left)
                left = _after(left, count)
                at += count
            if durable and begun + _STRETCH_BYTES <= at:
                hints.begin_writing_back(fd, begun, at - begun)
                begun = at
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    return at


def _pieces(buffers: Iterable[bytes | memoryview]) -> Iterator[list[memoryview]]:
    """``buffers``, cut where `_WRITE_BYTES` are full, or as many parts as one call takes."""
    piece: list[memoryview] = []
    room = _WRITE_BYTES
    for buffer in buffers:
        data, at = memoryview(buffer).cast("B"), 0
        while at < len(data):
            part = data[at : at + room]
            piece.append(part)
            at += len(part)
            room -= len(part)
            if not room or len(piece) == _IOV_MAX:
                yield piece
                piece, room = [], _WRITE_BYTES
    if piece:
        yield piece

"""Objects as files below a folder of a local disk or a mounted file system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from typing_extensions import override

from featstore.errors import CorruptError, NotFoundError, StorageError
from featstore.store import partial
from featstore.store.objects import INTERNAL, Objects, Snapshot, check_key

_LOCKS = 64
_IOV_MAX = 1024
_thread_locks = tuple(threading.Lock() for _ in range(_LOCKS))

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


def storage_error(action: str, path: Path, error: OSError) -> StorageError:
    """What the operating system refused, as an error that says what to do about it."""
    reason = error.strerror or type(error).__name__
    hint = _HINTS.get(error.errno or 0, "check that disk, then run the same command again")
    return StorageError(f"cannot {action} {str(path)!r}: {reason}", hint=hint)


class LocalSnapshot(Snapshot):
    """A file that is open: a later put of the same key takes its name and leaves its bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size_bytes = os.fstat(self._fd).st_size

    @override
    def close(self) -> None:
        os.close(self._fd)

    @override
    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        todo = [buffer for buffer in buffers if buffer.nbytes]
        while todo:
            try:
                count = os.preadv(self._fd, todo[:_IOV_MAX], offset)
            except OSError as error:
                raise storage_error("read", self._path, error) from error
            if count == 0:
                raise CorruptError(f"{str(self._path)!r} ends at byte {offset}, before what it should hold")
            offset += count
            todo = _after(todo, count)


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What is left of ``buffers`` once ``count`` bytes of them are done."""
    for number, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer[count:], *buffers[number + 1 :]]
        count -= buffer.nbytes
    return []


class LocalObjects(Objects):
    """Objects as files below a folder.

    A put is temporary file, fsync, rename, fsync of the folder.

    Args:
        root: the folder.
        durable: False leaves out every fsync, for measurements only.
    """

    def __init__(self, root: Path, *, durable: bool = True) -> None:
        super().__init__(str(root))
        self.root = root
        self.durable = durable

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @override
    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    @override
    def size_bytes(self, key: str) -> int:
        try:
            return self._path(key).stat().st_size
        except OSError:
            return 0

    @override
    def open(self, key: str) -> LocalSnapshot:
        path = self._path(key)
        try:
            return LocalSnapshot(path)
        except OSError as error:
            if error.errno in _ABSENT:
                raise NotFoundError(f"there is no {str(path)!r}") from None
            raise storage_error("read", path, error) from error

    @override
    def names(self, folder: str) -> list[str]:
        path = self._path(folder) if folder else self.root
        try:
            return sorted(name for name in os.listdir(path) if name != INTERNAL)  # noqa: PTH208
        except OSError as error:
            if error.errno in _ABSENT:
                return []
            raise storage_error("list", path, error) from error

    @override
    def put(self, key: str, *buffers: bytes | memoryview, durable: bool = True) -> int:
        return self._put(key, buffers, os.replace, durable=durable)

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
        buffers: Sequence[bytes | memoryview],
        publish: Callable[[Path, Path], object],
        *,
        durable: bool,
    ) -> int:
        path, durable = self._path(key), durable and self.durable
        temporary = self.root / INTERNAL / partial.new_name()
        try:
            try:
                self._make_folder(temporary.parent)
                written = _write(temporary, buffers, durable=durable)
                self._make_folder(path.parent)
                publish(temporary, path)
                if durable:
                    self._sync_folder(path.parent)
            finally:
                # Gone already after a rename; after a link, an error or Ctrl-C it is ours to delete.
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()
        except FileExistsError:
            raise
        except OSError as error:
            raise storage_error("write", path, error) from error
        return written

    def _make_folder(self, path: Path) -> None:
        """Create ``path`` and what is missing above it, each one durable in its parent."""
        if path.is_dir():
            return
        self._make_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        self._sync_folder(path.parent)

    def _sync_folder(self, path: Path) -> None:
        if not self.durable:
            return
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network file systems have no fsync for folders; their renames are durable by themselves.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(fd)

    @override
    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                self._sync_folder(path.parent)
        except OSError as error:
            raise storage_error("delete", path, error) from error

    @override
    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold ``name`` among all threads and, on this machine, all processes.

        The kernel lets go of it when a process dies, however it dies. Names share a few lock files,
        so two names may also wait for each other: correct, only slower. On file systems without
        locks it holds among the threads of this process.
        """
        number = zlib.crc32(name.encode()) % _LOCKS
        path = self.root / INTERNAL / f"lock-{number:02d}"
        with _thread_locks[number]:
            try:
                self._make_folder(path.parent)
                fd = _open_lock(path)
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
        for path in (self.root, self.root / INTERNAL):
            if path.exists() and not os.access(path, os.W_OK | os.X_OK):
                raise storage_error("write", path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))

    @override
    def sweep(self) -> list[str]:
        return partial.sweep(self.root / INTERNAL)


def _open_lock(path: Path) -> int:
    """A descriptor to lock; of a colleague's file that we may only read, that is enough."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _link(temporary: Path, path: Path) -> None:
    """Publish under a name that must be free: a link, unlike a rename, refuses one that is taken."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        # No links here (exFAT, some network file systems): an empty file claims the name first.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        temporary.replace(path)


def _write(path: Path, buffers: Sequence[bytes | memoryview], *, durable: bool) -> int:
    """Write ``buffers`` to the new file ``path`` and return their length in bytes."""
    todo = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    total = sum(buffer.nbytes for buffer in todo)
    # Not mkstemp: a store is shared, so the file's mode follows the umask.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        while todo:
            todo = _after(todo, os.writev(fd, todo[:_IOV_MAX]))
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    return total

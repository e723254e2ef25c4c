"""What the store asks of the place where it lies: named objects that are put whole or not at all.

Everything above speaks of keys (``toyhorse/zarr.json``) and never of files or URLs, so that a folder,
a bucket and a server are the same to it.
"""

from __future__ import annotations

import abc
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Self, TypeVar

from featstore.errors import BadRequestError, CorruptError, ReplacedError
from featstore.store.crc import crc32c

INTERNAL = ".featstore"
"""First level of the keys of leases, locks and unfinished files; it holds nothing that features depend on."""

Extent = tuple[int, Sequence[memoryview]]
"""Offset of a stretch of an object in bytes, and the writable buffers that it fills one after the other."""

_READ_TRIES = 5

T = TypeVar("T")


LOCKS = 64
"""Locks that names share; twice as many with those that others are held within."""
OUTER = "outer/"
"""Beginning of names whose lock may be held while one of another name is taken."""


def lock_number(name: str) -> int:
    """Which of the 2 `LOCKS` locks is that of ``name``; never the same for an outer name and another."""
    return zlib.crc32(name.encode()) % LOCKS + (LOCKS if name.startswith(OUTER) else 0)


def check_key(key: str) -> str:
    """``key`` if it can name an object.

    Keys are made of checked names (`layout.check_segment`). This is the last line of defence for names
    that came from somebody else's store.

    Raises:
        BadRequestError: if it could lead out of the store.
    """
    # Every read passes here: few substrings are looked for, and names only taken apart that hold one of them.
    suspect = "//" in key or "/." in key or "\0" in key or not key or key[0] in "/." or key[-1] == "/"
    if suspect and ("\0" in key or any(part in ("", ".", "..") for part in key.split("/"))):
        raise BadRequestError(f"{key!r} is no name of an object in a store")
    return key


class Snapshot(abc.ABC):
    """One object as it was when it was opened: a later put of the same key does not change what it reads."""

    size_bytes: int
    """Length of the object."""
    version: str | None = None
    """What tells this state of the object from every other it ever has (a strong ETag); None where nothing does."""
    piece_bytes: int | None = None
    """How much is best read at once where reading is copying from memory; None where it is a request."""

    def __enter__(self) -> Self:
        """Itself; closed when the context is left."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of it."""

    @abc.abstractmethod
    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill ``buffers`` (writable, contiguous bytes), one after the other, from ``offset`` on.

        Raises:
            CorruptError: if the object ends before.
            StorageError: if the disk or the other side fails.
        """

    def read_many(self, extents: Sequence[Extent]) -> None:
        """`read_into` for each of several extents; where a request takes long, several at once."""
        for offset, buffers in extents:
            self.read_into(offset, buffers)

    def read_summed(self, offset: int, target: memoryview, rest: memoryview) -> int:
        """`read_into` of ``target`` and then ``rest``; the crc32c of what is in ``target``."""
        self.read_into(offset, [target, rest])
        return int(crc32c(target))

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``; errors of `read_into`."""
        out = bytearray(length)
        self.read_into(offset, [memoryview(out)])
        return bytes(out)

    def read_tail(self, length: int) -> bytes:
        """The last ``length`` bytes; errors of `read_into`."""
        if length > self.size_bytes:
            raise CorruptError(f"it is truncated: {self.size_bytes} bytes, its end alone has {length}")
        return self.read(self.size_bytes - length, length)


class Objects(abc.ABC):
    """Named objects in one place.

    A put is atomic (readers see the old or the new object, whole) and durable (it survives a power cut
    once the call has returned). Instances are picklable: tasks carry them to workers.

    Args:
        url: where they lie, as people type it.
    """

    read_only = False
    """Whether nothing can ever be put here, as over HTTP."""
    can_list = True
    """Whether `names` works."""
    lock_reaches_all = False
    """Whether `lock` holds among all who may write here, and not only among the threads of this process."""
    parallel_reads = 1
    """Reads that are best under way at once: 1 where they are copies from memory, more where they are requests."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abc.abstractmethod
    def exists(self, key: str) -> bool:
        """Whether there is an object ``key``."""

    @abc.abstractmethod
    def size_bytes(self, key: str) -> int:
        """Length of the object ``key``; 0 if there is none."""

    @abc.abstractmethod
    def open(self, key: str) -> Snapshot:
        """The object ``key`` for positioned reads.

        Raises:
            NotFoundError: if there is none.
            StorageError: if the disk or the other side fails or refuses.
        """

    def read_with(self, key: str, read: Callable[[Snapshot], T]) -> T:
        """What ``read`` makes of the object ``key``, called again where that was replaced before it was done.

        A file that is open stays what it was; an object elsewhere may be replaced between two requests.

        Raises:
            NotFoundError, StorageError: as `open`.
            ReplacedError: if it is replaced time and again.
        """
        for left in reversed(range(_READ_TRIES)):
            try:
                with self.open(key) as snapshot:
                    return read(snapshot)
            except ReplacedError:
                if not left:
                    raise
        raise AssertionError("unreachable")

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        """The whole object ``key``.

        Raises:
            NotFoundError, StorageError: as `open`.
            CorruptError: if it is longer than ``max_bytes``, which no sound one is.
        """
        with self.open(key) as snapshot:
            if max_bytes is not None and snapshot.size_bytes > max_bytes:
                raise CorruptError(f"{key} has {snapshot.size_bytes} bytes; at most {max_bytes} are sound")
            return snapshot.read(0, snapshot.size_bytes)

    @abc.abstractmethod
    def names(self, folder: str) -> list[str]:
        """Names directly in ``folder`` (``""`` is the store), objects and folders alike, sorted; `INTERNAL` left out.

        Empty if there is no such folder.
        """

    @abc.abstractmethod
    def put(self, key: str, *buffers: bytes | memoryview, durable: bool = True) -> int:
        """Write the concatenated ``buffers`` as object ``key``, in the place of what was there.

        Args:
            key: name of the object.
            buffers: its bytes.
            durable: False where it may be lost in a power cut: a lease, a hint.

        Returns:
            Number of bytes written.

        Raises:
            StorageError: if the disk or the other side fails or refuses; the old object, if any, is then untouched.
        """

    def put_parts(self, key: str, parts: Iterable[bytes | memoryview]) -> int:
        """`put` of parts that are taken one after the other, each when its turn has come; errors of `put`."""
        return self.put(key, *parts)

    def put_unsettled(self, key: str, *buffers: bytes | memoryview) -> int:
        """`put`, but until `settle` a power cut may bring back what was there before, whole; errors of `put`."""
        return self.put(key, *buffers)

    def settle(self, folder: str) -> None:
        """Let what `put_unsettled` put into ``folder``, by this process or others, survive a power cut.

        Raises:
            StorageError: if the disk fails.
        """
        return

    @abc.abstractmethod
    def put_new(self, key: str, *buffers: bytes | memoryview, durable: bool = True) -> bool:
        """Like `put`, but only if there is no object ``key`` yet; False if there is.

        Of several callers at once, on whatever machines, exactly one gets True.
        """

    @abc.abstractmethod
    def delete(self, key: str, *, durable: bool = True) -> None:
        """Remove the object ``key``; no error if there is none.

        Args:
            key: name of the object.
            durable: False where it may come back after a power cut.
        """

    def prune(self, folder: str) -> None:
        """Remove the folder ``folder`` and folders in it as far as they are empty, where there are such things."""
        return

    @abc.abstractmethod
    def lock(self, name: str) -> AbstractContextManager[None]:
        """Hold ``name`` among all threads of this process, and further where that is possible.

        Not to be nested, but for names that begin with `OUTER`, within which others may be held.
        """

    @abc.abstractmethod
    def require_writable(self) -> None:
        """Raise StorageError if nothing could be put here, before anybody computes something to put."""

    def doubt(self, key: str) -> bool:
        """Say that what was read of ``key`` does not match its checksums; True if reading it again may help."""
        return False

    def sweep(self) -> list[str]:
        """Delete what killed writers left unfinished; returns the names."""
        return []

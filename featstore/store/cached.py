"""A remote store read through a cache on the local disk: what was read once is read from here again.

Only shards are cached, in pages of fixed length. Every opening asks the remote which state of the shard
is current (its ETag), and pages belong to one state, so bytes of a shard that was replaced are never
served; they age out. Records and documents are small and say what is true now: they always come from
the remote.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import re
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from typing_extensions import override

from featstore.errors import CorruptError, FeatstoreError, StorageError
from featstore.store import layout
from featstore.store.local import LocalObjects
from featstore.store.objects import Extent, Objects, Snapshot
from featstore.store.pages import PAGE_BYTES, PageCache

DEFAULT_BYTES = 50 * 10**9
"""Bound of a cache where none is given."""
_CHUNK = re.compile(r"c(?:\.\d+)+")
_FETCH_BYTES = 64 << 20
"""Bytes fetched at once and held until they are copied: about a shard."""


@dataclasses.dataclass(slots=True, kw_only=True)
class CacheUse:
    """What reads through a cache asked of it, in bytes of whole pages."""

    hit_bytes: int = 0
    """Read from the local disk."""
    missed_bytes: int = 0
    """Fetched from the remote."""


def through_cache(objects: Objects, folder: Path, limit_bytes: int) -> Objects:
    """``objects`` read through the cache in ``folder``; those of a local disk as they are."""
    return objects if isinstance(objects, LocalObjects) else CachedObjects(objects, folder, limit_bytes)


class CachedObjects(Objects):
    """Objects of a remote place, to be read only, whose shards are read through a local cache.

    Args:
        inner: the objects.
        folder: of the cache; may be shared with other processes and stores.
        limit_bytes: bytes that the folder never exceeds.

    Raises:
        BadRequestError, StorageError: if there can be no such cache.
    """

    read_only = True

    def __init__(self, inner: Objects, folder: Path, limit_bytes: int = DEFAULT_BYTES) -> None:
        super().__init__(inner.url)
        self.inner = inner
        self.can_list, self.parallel_reads = inner.can_list, inner.parallel_reads
        self.pages = PageCache(folder, limit_bytes)
        self.use = CacheUse()
        self._lock = threading.Lock()
        self._doubted: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedObjects, (self.inner, self.pages.folder, self.pages.limit_bytes)

    @override
    def open(self, key: str) -> Snapshot:
        snapshot = self.inner.open(key)
        if not _is_shard(key) or key in self._doubted or snapshot.version is None:
            return snapshot
        return _CachedSnapshot(self, snapshot, self._identity(key, snapshot))

    def _identity(self, key: str, snapshot: Snapshot) -> bytes:
        return self.pages.identity(self.url, key, str(snapshot.version), str(snapshot.size_bytes))

    def count(self, *, hit_bytes: int, missed_bytes: int) -> None:
        """Add to `use`."""
        with self._lock:
            self.use.hit_bytes += hit_bytes
            self.use.missed_bytes += missed_bytes

    @override
    def doubt(self, key: str) -> bool:
        # The checksum of a page says that it is what was fetched, not that it was fetched soundly.
        if key in self._doubted or not _is_shard(key):
            return self.inner.doubt(key)
        self._doubted.add(key)
        with contextlib.suppress(FeatstoreError), self.inner.open(key) as snapshot:
            self.pages.forget(self._identity(key, snapshot))
        return True

    @override
    def exists(self, key: str) -> bool:
        return self.inner.exists(key)

    @override
    def size_bytes(self, key: str) -> int:
        return self.inner.size_bytes(key)

    @override
    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        if not _is_shard(key):
            return self.inner.get(key, max_bytes=max_bytes)

        def whole(snapshot: Snapshot) -> bytes:
            if max_bytes is not None and snapshot.size_bytes > max_bytes:
                raise CorruptError(f"{key} has {snapshot.size_bytes} bytes; at most {max_bytes} are sound")
            return snapshot.read(0, snapshot.size_bytes)

        return self.read_with(key, whole)

    @override
    def names(self, folder: str) -> list[str]:
        return self.inner.names(folder)

    @override
    def put(self, key: str, *buffers: bytes | memoryview, durable: bool = True) -> int:
        raise self._refusal()

    @override
    def put_new(self, key: str, *buffers: bytes | memoryview, durable: bool = True) -> bool:
        raise self._refusal()

    @override
    def delete(self, key: str, *, durable: bool = True) -> None:
        raise self._refusal()

    @override
    def lock(self, name: str) -> AbstractContextManager[None]:
        raise self._refusal()

    @override
    def require_writable(self) -> None:
        raise self._refusal()

    def _refusal(self) -> StorageError:
        return StorageError(f"{self.url!r} is read through a cache; nothing is written that way")


def _is_shard(key: str) -> bool:
    """Whether ``key`` holds features, or what belongs to them, and not what says which of them there are."""
    *folders, name = key.split("/")
    return _CHUNK.fullmatch(name) is not None and not {layout.COMMITTED, layout.SAMPLES} & set(folders)


class _CachedSnapshot(Snapshot):
    """A shard in one state, its pages read from the local disk where they are there."""

    def __init__(self, objects: CachedObjects, inner: Snapshot, identity: bytes) -> None:
        self._objects = objects
        self._pages = objects.pages
        self._inner = inner
        self._identity = identity
        self.size_bytes = inner.size_bytes
        self.version = inner.version

    @override
    def close(self) -> None:
        self._inner.close()

    @override
    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.read_many([(offset, buffers)])

    @override
    def read_many(self, extents: Sequence[Extent]) -> None:
        targets = _Targets(extents)
        if targets.end > self.size_bytes:
            self._inner.read_many(extents)  # It says what is wrong with that.
            return
        missing = []
        hit_bytes = 0
        for number in targets.pages():
            page = self._pages.load(self._identity, number)
            if page is None:
                missing.append(number)
            else:
                targets.fill(number * PAGE_BYTES, page)
                hit_bytes += len(page)
        self._objects.count(hit_bytes=hit_bytes, missed_bytes=0)
        if missing and not self._pages.keeps(self._length(missing[0])):
            self._inner.read_many(extents)  # No use in fetching more than what was asked for.
            return
        step = _FETCH_BYTES // PAGE_BYTES
        for first in range(0, len(missing), step):
            self._fetch(missing[first : first + step], targets)

    def _length(self, number: int) -> int:
        return min(PAGE_BYTES, self.size_bytes - number * PAGE_BYTES)

    def _fetch(self, numbers: Sequence[int], targets: _Targets) -> None:
        """Fetch pages, use them and keep them."""
        pages = {number: memoryview(bytearray(self._length(number))) for number in numbers}
        fetched: list[tuple[int, list[memoryview]]] = []
        for number, page in pages.items():
            if fetched and fetched[-1][0] + PAGE_BYTES * len(fetched[-1][1]) == number * PAGE_BYTES:
                fetched[-1][1].append(page)
            else:
                fetched.append((number * PAGE_BYTES, [page]))
        self._inner.read_many(fetched)
        for number, page in pages.items():
            targets.fill(number * PAGE_BYTES, page)
            self._pages.store(self._identity, number, page)
        self._objects.count(hit_bytes=0, missed_bytes=sum(map(len, pages.values())))


class _Targets:
    """Buffers that stand for stretches of an object and are filled page by page."""

    def __init__(self, extents: Sequence[Extent]) -> None:
        pieces = []
        for offset, buffers in extents:
            for buffer in buffers:
                if buffer.nbytes:
                    pieces.append((offset, buffer.cast("B")))
                    offset += buffer.nbytes
        self._pieces = sorted(pieces, key=lambda piece: piece[0])
        self._starts = [offset for offset, _ in self._pieces]
        self._longest = max((len(buffer) for _, buffer in self._pieces), default=0)
        self.end = max((offset + len(buffer) for offset, buffer in self._pieces), default=0)

    def pages(self) -> list[int]:
        """Numbers of the pages that hold what is wanted, ascending."""
        wanted: set[int] = set()
        for offset, buffer in self._pieces:
            wanted.update(range(offset // PAGE_BYTES, (offset + len(buffer) - 1) // PAGE_BYTES + 1))
        return sorted(wanted)

    def fill(self, start: int, page: memoryview) -> None:
        """Copy from ``page``, which begins at byte ``start`` of the object, what is wanted of it."""
        end = start + len(page)
        first = bisect.bisect_left(self._starts, start - self._longest)
        for offset, buffer in self._pieces[first : bisect.bisect_left(self._starts, end)]:
            low, high = max(offset, start), min(offset + len(buffer), end)
            if low < high:
                buffer[low - offset : high - offset] = page[low - start : high - start]

"""A data set whose images and masks are files: digests through a cache, pixels on demand."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from featstore import cache
from featstore.datasets.base import Dataset, DatasetInfo, Sample, UInt8Array, UnreadableImageError, other_bytes
from featstore.datasets.pixels import read_image, read_mask
from featstore.errors import BadRequestError, unknown_name

CACHE_FROM_BYTES = 16 * 2**20
"""Sets with at least this many bytes of images have their digests kept in the user's cache."""
_SETTLED_SECONDS = 2
_HASHING_THREADS = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileItem:
    """One image on disk."""

    key: str
    """Its name in the data set: the path below the root, with forward slashes."""
    image: Path
    mask: Path | None
    """File of its labels; None: it has none."""
    split: str


class FileDataset(Dataset):
    """Images in files, in the given order; the digest of a sample is the SHA-256 of its file."""

    def __init__(
        self, info: DatasetInfo, root: Path, items: Sequence[FileItem], *, cache_from_bytes: int = CACHE_FROM_BYTES
    ) -> None:
        self._info = info
        self.root = root
        self.items = tuple(items)
        self._by_key = {item.key: item for item in self.items}
        self._cache_from_bytes = cache_from_bytes
        self._samples: tuple[Sample, ...] | None = None

    @property
    def info(self) -> DatasetInfo:
        """What is known of the whole."""
        return self._info

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples; the first read hashes every file that the cache does not know."""
        if self._samples is None:
            digests = self._digests()
            self._samples = tuple(
                Sample(key=item.key, digest=digest, split=item.split)
                for item, digest in zip(self.items, digests, strict=True)
            )
        return self._samples

    @property
    def plain_files(self) -> bool:
        """Whether each image is the content of one file, and its digest that file's SHA-256."""
        own = type(self)
        return own.image is FileDataset.image and own._digests is FileDataset._digests

    def path(self, key: str) -> Path:
        """File of an image.

        Raises:
            BadRequestError: if the data set has no such key.
        """
        return self._item(key).image

    def _digests(self) -> list[str]:
        """The digest of each item."""
        images = [item.image for item in self.items]
        return file_digests(self.root, images, cache_from_bytes=self._cache_from_bytes)

    def image(self, key: str) -> UInt8Array:
        """The image in the sample's file, uint8 (H, W, 3)."""
        path = self._item(key).image
        if path.is_symlink() and not path.exists():
            raise UnreadableImageError(f"{path}: a broken link to {path.readlink()}")
        return read_image(path)

    def image_as(self, key: str, digest: str) -> UInt8Array:
        """`image`, of a file that has this SHA-256."""
        path = self._item(key).image
        if _digest(path) != digest:
            raise other_bytes(path) if path.exists() else UnreadableImageError(f"{path}: there is no such file")
        return self.image(key)

    def mask(self, key: str) -> UInt8Array | None:
        """The labels in the sample's mask file, uint8 (h, w); None if it has none."""
        path = self._item(key).mask
        return None if path is None else read_mask(path)

    def _item(self, key: str) -> FileItem:
        try:
            return self._by_key[key]
        except KeyError:
            if len(self._by_key) > 10_000:  # the nearest of so many names would take minutes to find
                raise BadRequestError(f"data set {self.info.name!r} has no image {key!r}") from None
            raise unknown_name("image", key, self._by_key) from None


def file_digests(
    root: Path,
    paths: Sequence[Path],
    *,
    cache_from_bytes: int = CACHE_FROM_BYTES,
    advance: Callable[[], None] | None = None,
    digest_of: Callable[[Path], str] | None = None,
    kind: str = "folder-digests",
) -> list[str]:
    """SHA-256 (hex) of each file's bytes, or what ``digest_of`` gives for it.

    A file that cannot be read gets a digest that no file has: it stays a sample, fails when it is
    decoded, and is tried again once it can be read.

    Args:
        root: folder that the files are below; names the cache entry.
        paths: the files.
        cache_from_bytes: from how many bytes in all the digests are kept and looked up in the cache.
        advance: called once for each file, when its digest is known.
        digest_of: what is taken for a file's digest in place of the SHA-256 of its bytes; see `unreadable_digest`.
        kind: name of the cache entry's kind, one for each ``digest_of``.
    """
    advance = advance or (lambda: None)
    take = digest_of or _digest
    stats = [_stat(path) for path in paths]
    use_cache = sum(size for size, *_ in stats) >= cache_from_bytes
    identity = str(root.absolute())
    loaded = cache.load(kind, identity) if use_cache else None
    known = loaded if isinstance(loaded, dict) else {}
    names = [os.path.relpath(path, root) for path in paths]
    digests: list[str | None] = []
    for name, stat in zip(names, stats, strict=True):
        entry = known.get(name)
        if isinstance(entry, list) and len(entry) == 4 and tuple(entry[:3]) == stat:
            digests.append(entry[3])
            advance()
        else:
            digests.append(None)
    missing = [index for index, digest in enumerate(digests) if digest is None]
    with concurrent.futures.ThreadPoolExecutor(max_workers=_HASHING_THREADS) as pool:
        for index, digest in zip(missing, pool.map(lambda index: take(paths[index]), missing), strict=True):
            digests[index] = digest
            advance()
    if use_cache and missing:
        settled_before_ns = time.time_ns() - _SETTLED_SECONDS * 10**9
        # A file touched just now may change again within the same clock tick: it is hashed once more.
        entries = {
            name: [*stat, digest]
            for name, stat, digest in zip(names, stats, digests, strict=True)
            if 0 < stat[1] < settled_before_ns
        }
        cache.save(kind, identity, entries)
    return [digest for digest in digests if digest is not None]


def _stat(path: Path) -> tuple[int, int, int]:
    """(size, mtime_ns, ctime_ns); the change time tells files apart that were swapped with their dates kept."""
    try:
        stat = path.stat()
    except OSError:
        return 0, 0, 0
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return unreadable_digest(path)


def unreadable_digest(path: Path) -> str:
    """A digest that no file has, for one that cannot be read."""
    return hashlib.sha256(b"featstore: a file that cannot be read\0" + os.fsencode(path)).hexdigest()

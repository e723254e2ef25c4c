"""Known data sets' files onto this machine: downloaded, compared, unpacked, put in their places.

What is unfinished lies in ``<data root>/.fetch/<archive>/`` and is never looked at as a data set. Its folders are
renamed to their places when all of the archive is on the disk; whoever is killed before that goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from featstore.datasets import DATASETS, lock_file
from featstore.datasets.archives import Archive
from featstore.datasets.lock_file import Locked
from featstore.datasets.unpack import Limits, unpack
from featstore.errors import BusyError, CorruptError, StorageError
from featstore.pipelines.fetch_plan import FetchPlan
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.space import require_space
from featstore.whole_file import sync_folder

_HASHED_BYTES = 2**22


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FetchReport:
    """What was done."""

    dataset: str
    where: Path | None
    """Folder in which the data set is looked for; None: it needs no files."""
    fetched: bool
    """False: it was there already."""
    url: str | None = None
    archive_bytes: int = 0
    """Length of the archive."""
    received_bytes: int = 0
    """How much of it was downloaded by this call."""
    sha256: str | None = None
    compared: str | None = None
    """What the archive was compared with: ``md5``.. of its publisher or mirrors, ``lock``, or ``nothing`` (the first
    download is trusted)."""
    folders: tuple[Path, ...] = ()
    """What has been put in its place."""
    unpacked_bytes: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        content = dataclasses.asdict(self)
        return content | {
            "where": None if self.where is None else str(self.where),
            "folders": [str(folder) for folder in self.folders],
        }


def fetch(plan: FetchPlan, progress: Progress | None = None) -> FetchReport:
    """Do what a plan says.

    Raises:
        NotFoundError, StorageError: if the archive cannot be downloaded, or there is too little space.
        CorruptError: if it is not what it was before or is known to be, is damaged, or holds what it must not.
        BusyError: if another process is fetching the same archive.
    """
    archive = plan.archive
    if archive is None:
        return FetchReport(dataset=plan.dataset, where=plan.where, fetched=False)
    begin = time.monotonic()
    try:
        with _alone(plan):
            if DATASETS[plan.dataset].present(plan.data_root):  # another process has fetched it since
                return FetchReport(dataset=plan.dataset, where=plan.where, fetched=False)
            report = _fetch(plan, archive, progress or Silent())
    except OSError as error:
        raise StorageError(
            f"cannot put {plan.dataset} into {plan.data_root}: {error.strerror or error}",
            hint="name another folder with --data-root",
        ) from error
    return dataclasses.replace(report, seconds=time.monotonic() - begin)


@contextlib.contextmanager
def _alone(plan: FetchPlan) -> Iterator[None]:
    """The folder of what is unfinished, held against other processes; it is gone in the end if it is empty."""
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, _held(plan.work))
        try:
            yield
        finally:
            for folder in (plan.work, plan.work.parent):
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _held(folder: Path) -> int:
    """A descriptor of a folder, made if need be, that this process alone has; closing it gives it back."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, handle)
                with contextlib.suppress(OSError):  # no locks on this file system
                    _lock(handle, folder.name)
                if os.path.samestat(os.fstat(handle), folder.stat()):
                    stack.pop_all()
                    return handle
            except FileNotFoundError:
                pass
        # Whoever had it has just ended, and deleted it: that was another folder.


def _lock(handle: int, name: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(
            f"another process is fetching {name}", hint="wait for it; the same command then finds what it has fetched"
        ) from None


def _fetch(plan: FetchPlan, archive: Archive, progress: Progress) -> FetchReport:
    whole = plan.work / archive.name
    known = lock_file.load(plan.data_root).get(archive.url)
    received = 0 if whole.exists() else _download(plan, archive, whole, progress)
    compared, locked = _compare(plan, archive, whole, known, progress)
    with _unpacked(plan, archive, whole, progress) as (folder, unpacked_bytes):
        found = _find(plan, archive, folder)
        # Once for all files: some sets have tens of thousands, and one by one takes as many times longer.
        os.sync()
        lock_file.add(plan.data_root, archive.url, locked)
        placed = _place(plan, found)
    whole.unlink()
    return FetchReport(
        dataset=plan.dataset,
        where=plan.where,
        fetched=True,
        url=archive.url,
        archive_bytes=locked.bytes,
        received_bytes=received,
        sha256=locked.sha256,
        compared=compared,
        folders=placed,
        unpacked_bytes=unpacked_bytes,
    )


@contextlib.contextmanager
def _unpacked(plan: FetchPlan, archive: Archive, whole: Path, progress: Progress) -> Iterator[tuple[Path, int]]:
    """A folder with all files of the archive and how many bytes they have; it is deleted in the end."""
    folder = plan.work / "unpacked"
    if folder.exists():  # of a process that was killed
        shutil.rmtree(folder)
    _require_space(plan, archive, 0)
    folder.mkdir()
    try:
        progress.start(f"unpacking {archive.name}", whole.stat().st_size, "bytes")
        try:
            limits = Limits(bytes=archive.unpacked_limit_bytes, entries=archive.entries_limit)
            unpacked_bytes = unpack(whole, folder, limits, progress.advance)
        finally:
            progress.stop()
        yield folder, unpacked_bytes
    except CorruptError:
        whole.unlink()  # the next call begins with another download
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Listener:
    """Shows a download, and stops it where the disk is too small."""

    def __init__(self, plan: FetchPlan, archive: Archive, progress: Progress) -> None:
        self._plan, self._archive, self._progress = plan, archive, progress

    def begin(self, have_bytes: int, total_bytes: int | None) -> None:
        """Say how much there is to do."""
        total = self._archive.download_bytes if total_bytes is None else total_bytes
        left = max(0, total - have_bytes)
        _require_space(self._plan, self._archive, left)
        here = f", {have_bytes / 1e6:.1f} MB are here already" if have_bytes else ""
        host = urlsplit(self._archive.url).hostname
        self._progress.note(f"{self._archive.name}: {left / 1e6:.1f} MB to fetch from {host}{here}")
        self._progress.start(f"fetching {self._archive.name}", left, "bytes")

    def advance(self, steps: int) -> None:
        """Move the bar."""
        self._progress.advance(steps)

    def note(self, text: str) -> None:
        """Say it."""
        self._progress.note(text)


def _download(plan: FetchPlan, archive: Archive, whole: Path, progress: Progress) -> int:
    from featstore.datasets.download import download  # an HTTP client takes a tenth of a second to import

    try:
        return download(archive.url, whole, _Listener(plan, archive, progress), limit_bytes=2 * archive.download_bytes)
    finally:
        progress.stop()


def _require_space(plan: FetchPlan, archive: Archive, download_bytes: int) -> None:
    require_space(
        plan.data_root,
        download_bytes + archive.unpacked_bytes,
        what=f"files of {archive.name}" + (" and itself" if download_bytes else ""),
        hint="make room, or name another disk with --data-root",
    )


def _compare(
    plan: FetchPlan, archive: Archive, whole: Path, known: Locked | None, progress: Progress
) -> tuple[str, Locked]:
    """Compare a download with what is known of it, and say with what that was; what differs is deleted."""
    algorithm, _, expected = (archive.digest or "").partition(":")
    sha256 = hashlib.sha256()
    other = hashlib.new(algorithm, usedforsecurity=False) if algorithm else None
    size_bytes = whole.stat().st_size
    progress.start(f"checking {archive.name}", size_bytes, "bytes")
    try:
        with whole.open("rb") as file:
            while piece := file.read(_HASHED_BYTES):
                sha256.update(piece)
                if other is not None:
                    other.update(piece)
                progress.advance(len(piece))
    finally:
        progress.stop()
    locked = Locked(bytes=size_bytes, sha256=sha256.hexdigest())
    if other is not None and other.hexdigest() != expected:
        whole.unlink()
        raise CorruptError(
            f"{archive.name} has the {algorithm} {other.hexdigest()}, and it should be {expected}",
            hint="it was deleted: fetch it again; if that ends in the same way, its server has another file now",
        )
    if known is not None and known != locked:
        whole.unlink()
        lock = plan.data_root / lock_file.NAME
        raise CorruptError(
            f"{archive.name} has the sha256 {locked.sha256} ({locked.bytes:,} bytes), and {lock} says {known.sha256} "
            f"({known.bytes:,} bytes)",
            hint=f"it was deleted: fetch it again; to accept another file, remove the entry of {archive.url} from "
            f"{lock} first",
        )
    return algorithm or ("nothing" if known is None else "lock"), locked


def _find(plan: FetchPlan, archive: Archive, unpacked: Path) -> dict[Path, Path]:
    """Where the folders of an archive's data sets were unpacked, by where they belong; the one asked for is the last.

    Killed between two renames, the data set that was asked for is then not there, and the next call goes on.
    """
    found = {}
    for name in sorted(archive.folders, key=lambda name: name == plan.dataset):
        folder = archive.folders[name]
        # At the top of the archive, or below one folder that wraps all.
        places = [place for place in (unpacked / folder, *sorted(unpacked.glob(f"*/{folder}"))) if place.is_dir()]
        if places:
            found[plan.data_root / folder] = places[0]
        elif name == plan.dataset:
            raise CorruptError(
                f"{archive.name} holds no folder {folder!r}", hint="it was deleted: its server has another file now"
            )
    return found


def _place(plan: FetchPlan, found: dict[Path, Path]) -> tuple[Path, ...]:
    """Rename folders to where they belong; what is there already stays as it is."""
    placed = []
    for target, source in found.items():
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            source.rename(target)
            placed.append(target)
    sync_folder(plan.data_root)
    return tuple(placed)

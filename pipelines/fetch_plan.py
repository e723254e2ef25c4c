"""What fetching a data set would do, found out without a server."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from featstore.datasets import DATASETS, resolve_data_root
from featstore.datasets.archives import ARCHIVES, BY_HAND, Archive
from featstore.errors import BadRequestError

UNFINISHED = ".fetch"
"""Folder below the data root of what is being fetched."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FetchPlan:
    """What fetching a data set would do."""

    dataset: str
    data_root: Path
    where: Path | None
    """Folder in which the data set is looked for; None: it needs no files."""
    present: bool
    """Whether it is there already, so that nothing is to be done."""
    archive: Archive | None
    """What is to be downloaded; None: nothing."""
    have_bytes: int = 0
    """How much of that is here already."""

    @property
    def work(self) -> Path:
        """Folder of what is unfinished."""
        assert self.archive is not None
        return self.data_root / UNFINISHED / self.archive.name

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "dataset": self.dataset,
            "where": None if self.where is None else str(self.where),
            "present": self.present,
            "archive": None
            if self.archive is None
            else {
                "url": self.archive.url,
                "bytes": self.archive.download_bytes,
                "have_bytes": self.have_bytes,
                "unpacked_bytes": self.archive.unpacked_bytes,
                "digest": self.archive.digest,
            },
        }


def make_plan(dataset: str, data_root: Path | None = None) -> FetchPlan:
    """Look what is there; asks no server.

    Args:
        dataset: name of a known data set.
        data_root: where data sets are looked for; None: ``$FEATSTORE_DATA``, else ``./data``.

    Raises:
        BadRequestError: for an unknown name, a data set that cannot be fetched, or something else in its place.
    """
    root = resolve_data_root(data_root)
    kind = dataset.partition(":")[0]
    if kind in ("folder", "hub"):
        entry = next(entry for name, entry in DATASETS.items() if name.partition(":")[0] == kind)
        raise BadRequestError(f"there is nothing to fetch for {dataset!r}", hint=entry.how_to_get)
    entry = DATASETS[dataset]
    where = entry.where(data_root)
    plan = FetchPlan(
        dataset=dataset,
        data_root=root,
        where=where,
        present=entry.present(data_root),
        archive=ARCHIVES.get(dataset),
    )
    if plan.present:
        return dataclasses.replace(plan, archive=None)
    if plan.archive is None:
        why = BY_HAND.get(dataset, "nobody has said where its files are")
        raise BadRequestError(f"data set {dataset!r} cannot be fetched: {why}", hint=entry.how_to_get)
    target = root / plan.archive.folders[dataset]
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise BadRequestError(
            f"{target.absolute()} is there and is not the data set {dataset!r}",
            hint="move it away, or name another folder with --data-root",
        )
    whole = plan.work / plan.archive.name
    sizes = [path.stat().st_size for path in (whole, whole.with_name(f"{whole.name}.part")) if path.is_file()]
    return dataclasses.replace(plan, have_bytes=max(sizes, default=0))

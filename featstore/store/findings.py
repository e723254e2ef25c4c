"""What is found wrong with a store, and what is done about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from featstore.errors import BadRequestError, CorruptError, FeatstoreError, IncompatibleError, NotFoundError
from featstore.store import metadata
from featstore.store.objects import Objects

UNREADABLE = (CorruptError, NotFoundError, BadRequestError)
"""What reading a document raises that is not as it was written."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `featstore.store.verify.verify` found, as it was before any repair."""

    checked_images: int
    """Images of runs of which at least one map was read."""
    checked_bytes: int
    """Bytes of maps that were read."""
    corrupt: tuple[str, ...]
    """Files or rows that are broken, each with the remedy."""
    incomplete: tuple[str, ...]
    """Layers of runs in which rows are absent or stale, with their number."""
    nonfinite: tuple[str, ...]
    """Maps that hold NaN or infinities."""
    orphans: tuple[str, ...] = ()
    """Files and folders that no document names: nothing reads them. No damage."""
    repaired: int = 0
    """Documents that were written anew and rows that were uncommitted."""

    @property
    def ok(self) -> bool:
        """Nothing is corrupt, nothing is missing, nothing is NaN or infinite."""
        return not (self.corrupt or self.incomplete or self.nonfinite)

    def to_json(self) -> dict[str, Any]:
        """The JSON of ``featstore verify``."""
        return {
            "checked_images": self.checked_images,
            "checked_bytes": self.checked_bytes,
            "corrupt": list(self.corrupt),
            "incomplete": list(self.incomplete),
            "nonfinite": list(self.nonfinite),
            "orphans": list(self.orphans),
            "ok": self.ok,
        }


class Findings:
    """What one pass over a store has found so far.

    Args:
        repair: whether what is broken is to be mended.
    """

    def __init__(self, *, repair: bool) -> None:
        self.repair = repair
        self.images = 0
        self.bytes = 0
        self.corrupt: list[str] = []
        self.incomplete: list[str] = []
        self.nonfinite: list[str] = []
        self.orphans: list[str] = []
        self.repaired = 0

    def broken(
        self, error: FeatstoreError, mend: Callable[[], object] | None = None, *, done: str = "written anew"
    ) -> None:
        """Record that something is broken.

        Args:
            error: what, with the remedy as its hint.
            mend: puts it right; called if that is asked for. What it raises in vain is recorded instead of ``done``.
            done: what ``mend`` has done, for the report.
        """
        text = f"{error}; {error.hint}" if error.hint else str(error)
        if self.repair and mend is not None:
            try:
                mend()
            except FeatstoreError as failure:
                text = f"{error}; it could not be mended: {failure}" + (f"; {failure.hint}" if failure.hint else "")
            else:
                self.repaired += 1
                text = f"{error}; {done}"
        self.corrupt.append(text)

    def report(self) -> VerifyReport:
        """All of it."""
        return VerifyReport(
            checked_images=self.images,
            checked_bytes=self.bytes,
            corrupt=tuple(self.corrupt),
            incomplete=tuple(self.incomplete),
            nonfinite=tuple(self.nonfinite),
            orphans=tuple(self.orphans),
            repaired=self.repaired,
        )


def check_document(
    objects: Objects,
    key: str,
    document: dict[str, Any],
    fits: Callable[[dict[str, Any]], bool],
    findings: Findings,
) -> None:
    """Check that what is at ``key`` is sound and ``fits``; else ``document`` is what belongs there."""
    try:
        if fits(metadata.read(objects, key)):
            return
        damage = CorruptError(f"{key} does not describe what is there", hint=metadata.remedy(key))
    except (*UNREADABLE, IncompatibleError) as error:
        damage = CorruptError(str(error), hint=metadata.remedy(key))
    findings.broken(damage, lambda: metadata.write(objects, key, document))

"""Every error that featstore raises on purpose.

The classes differ in what a handler would do, not in where they were raised::

    FeatstoreError
    |-- BadRequestError      the caller asked for something that cannot be: change the request
    |-- NotFoundError        data or weights are absent: fetch them or name another place
    |   `-- NotCommittedError    features were never (or only partly) extracted: extract them
    |-- CorruptError         stored bytes fail their checksum: verify --repair, then extract
    |   `-- ReplacedError        an object was replaced while it was read: read it again
    |-- IncompatibleError    a store or file of another format: upgrade featstore or use another store
    |-- BusyError            somebody else holds it: wait and try again
    `-- StorageError         the disk or the remote failed: free space, check access, try again

A message is one line: the value at fault, and what is allowed. ``hint`` says what to do next; the
command line prints it on a second line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FeatstoreError(Exception):
    """Base of all errors raised on purpose; ``hint`` is what the user can do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class BadRequestError(FeatstoreError, ValueError):
    """The request itself is wrong; nothing was started."""

    exit_code = 2


class NotFoundError(FeatstoreError, LookupError):
    """Data, weights or a run that the request needs is not there."""

    exit_code = 2


class NotCommittedError(NotFoundError):
    """The features asked for were not extracted, or only in part, or are stale."""


class CorruptError(FeatstoreError):
    """Stored bytes do not match their checksum, or metadata does not match its digest."""


class ReplacedError(CorruptError):
    """A stored object was replaced by another one while it was being read."""


class IncompatibleError(FeatstoreError):
    """A store, head or recipe of a format that this version cannot use."""

    exit_code = 2


class BusyError(FeatstoreError):
    """Another process holds what is needed."""


class StorageError(FeatstoreError):
    """The disk or the remote store failed."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, hint: str | None = None) -> BadRequestError:
    """The error for a name that is not known: says the value, what is allowed and the nearest.

    Args:
        kind: what the name was meant to be, as a singular noun ("data set").
        name: what was asked for.
        known: the valid names.
        hint: replaces the "did you mean" hint where there is a better one.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if hint is None and near:
        hint = f"did you mean {near[0]!r}?"
    allowed = ", ".join(names) if len(names) <= 30 else ", ".join(names[:30]) + ", .."
    return BadRequestError(f"unknown {kind} {name!r}; known: {allowed}", hint=hint)

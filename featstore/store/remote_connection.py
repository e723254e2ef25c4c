"""Requests to one remote place: made again where that helps, a bounded number at once, their failures explained.

obstore would repeat requests itself. It is told not to (but for the parts of large uploads), because it
repeats an unknown host as patiently as an overloaded server, says nothing of its tries, and does not
tell a create-only put that found somebody else's object from one that found its own after a lost answer.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from obstore.exceptions import BaseError

from featstore.errors import CorruptError, FeatstoreError, NotFoundError, ReplacedError, StorageError
from featstore.store.remote_client import Use, environment, make_client
from featstore.store.remote_config import RemoteConfig
from featstore.store.remote_errors import CONDITIONAL_HINT, Cause, CutOffError, Trouble, diagnose

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_BACKOFF_SECONDS = 0.2
_MAX_BACKOFF_SECONDS = 10.0
_UNREACHABLE_SECONDS = 2.0
"""How long a server is looked for that has never answered; one that has may just be restarting."""
_AGAIN = "check the network and the server, then run the same command again: what is committed stays"

_first_pid: int | None = None
"""The process in which the first request was made."""

T = TypeVar("T")


class Connection:
    """The clients of one place, shared by all that read and write there in this process.

    Args:
        scheme: as in `make_client`.
        root: bucket, container or server.
        config: how patient requests are.
        variables: of the environment that the clients are made from.
    """

    def __init__(self, scheme: str, root: str, config: RemoteConfig, variables: dict[str, str]) -> None:
        self.scheme, self.root, self.config = scheme, root, config
        self._variables = variables
        self.quick = make_client(scheme, root, config, variables, Use.QUICK)
        # Of the many servers of S3's interface some have no conditional puts, which has to be seen first.
        self.conditional_puts = scheme != "s3"
        self.conditional_lock = threading.Lock()
        self._answered = False
        self._requests = threading.BoundedSemaphore(config.requests)

    @cached_property
    def slow(self) -> ObjectStore:
        """A client for large uploads."""
        return make_client(self.scheme, self.root, self.config, self._variables, Use.SLOW)

    @cached_property
    def parts(self) -> ObjectStore:
        """A client for uploads in parts."""
        return make_client(self.scheme, self.root, self.config, self._variables, Use.PARTS)

    def diagnose(self, error: Exception) -> Cause:
        """Why a request here failed."""
        return diagnose(error, "http" if self.scheme == "https" else self.scheme, self.root)

    def run(self, what: str, place: str, request: Callable[[], T]) -> T:
        """The answer to ``request``, which is made again while that may help.

        Args:
            what: for messages, a verb: read, write, list, delete.
            place: for messages, URL of the object.
            request: makes the request with one of the clients.

        Raises:
            NotFoundError: if there is no such object, or bucket when reading.
            ReplacedError: if the object is not the one asked for by its ETag.
            CorruptError: if it ends before what is asked for.
            StorageError: if the place is out of reach, refuses, or fails time and again.
        """
        _check_fork(what, place)
        begin = time.monotonic()
        for number in itertools.count(1):
            try:
                with self._requests:
                    answer = request()
            except (BaseError, CutOffError, OSError, ValueError) as error:
                cause = self.diagnose(error)
            else:
                self._answered = True
                return answer
            self._answered |= cause.trouble is not Trouble.UNREACHABLE
            pause = min(_BACKOFF_SECONDS * 2 ** min(number - 1, 16), _MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1.5)
            if time.monotonic() + pause - begin > self._patience_seconds(cause):
                raise _error(cause, what, place, number, time.monotonic() - begin)
            time.sleep(pause)
        raise AssertionError("unreachable")

    def _patience_seconds(self, cause: Cause) -> float:
        if cause.trouble is Trouble.PASSING:
            return self.config.retry_seconds
        if cause.trouble is Trouble.UNREACHABLE:
            return self.config.retry_seconds if self._answered else min(self.config.retry_seconds, _UNREACHABLE_SECONDS)
        return 0


def _error(cause: Cause, what: str, place: str, tries: int, seconds: float) -> FeatstoreError:
    """The error that callers see."""
    if cause.trouble is Trouble.ABSENT and what == "write":
        return StorageError(f"cannot write {place!r}: {cause.text}", hint="check that the bucket exists")
    if cause.trouble is Trouble.ABSENT:
        return NotFoundError(f"there is no {place!r}")
    if cause.trouble is Trouble.REPLACED:
        return ReplacedError(f"{place!r} was replaced while it was read", hint="read it again")
    if cause.trouble is Trouble.TOO_SHORT:
        return CorruptError(f"{place!r} is truncated: {cause.text}")
    said, hint = f"cannot {what} {place!r}: {cause.text}", cause.hint
    if cause.trouble in (Trouble.PASSING, Trouble.UNREACHABLE):
        said += f" ({tries} attempts in {seconds:.0f} s)"
    if cause.trouble is Trouble.PASSING:
        hint = hint or _AGAIN
    elif cause.trouble is Trouble.UNSUPPORTED and what == "write":
        hint = CONDITIONAL_HINT
    return StorageError(said, hint=hint)


def _check_fork(what: str, place: str) -> None:
    """Refuse to go on where obstore would wait without end: its threads do not live on in a forked process."""
    global _first_pid
    if _first_pid is None:
        _first_pid = os.getpid()
    elif _first_pid != os.getpid():
        raise StorageError(
            f"cannot {what} {place!r}: this process was forked from one that has used a remote store",
            hint="start workers by the method 'spawn', as in DataLoader(.., multiprocessing_context='spawn')",
        )


@functools.lru_cache(maxsize=64)
def _shared(scheme: str, root: str, config: RemoteConfig, variables: tuple[tuple[str, str], ...]) -> Connection:
    return Connection(scheme, root, config, dict(variables))


def connection_to(scheme: str, root: str, config: RemoteConfig) -> Connection:
    """The connection to a place, the same one for all in this process that ask under the same environment.

    Tasks bring their stores along by the thousand; each new client would open connections of its own.

    Raises:
        BadRequestError, StorageError: as `make_client`.
    """
    return _shared(scheme, root, config, tuple(sorted(environment().items())))

"""The log of one extraction, kept in the store: what was done when, by whom, and what came of it.

::

    .featstore/log/20260301T101500.123Z-1a2b3c4d/000000.jsonl         lines of JSON, a part a minute
    .featstore/log/20260301T101500.123Z-1a2b3c4d/000000-000059.jsonl  60 parts in one; those are deleted
    .featstore/log/20260301T101500.123Z-1a2b3c4d/summary.json         put at the end; none: killed, or goes on

Objects are created and never replaced, on disks and in buckets alike. A process that is killed loses what happened
since its last part. Size is bounded by time and the number of workers, not by the number of blocks (see `Lines`).

A log is for people. Nothing depends on it: one that cannot be written is said once, and the extraction goes on.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from featstore.errors import FeatstoreError
from featstore.store import partial
from featstore.store.objects import INTERNAL, Objects
from featstore.store.run_log_lines import Lines

FOLDER = f"{INTERNAL}/log"
SUMMARY = "summary.json"
FORMAT = 1
PART_SECONDS = 60.0
_PART_LINES = 4096
"""Lines after which a part is put before its time."""
_SINGLE = 50
_PARTS = 60
"""Parts that are made one."""
_SINGLE_OF_PARTS = 200
MAX_FAILED = 1000
"""Failed images whose reasons a summary holds."""
_MAX_REASON = 500


class RunLog:
    """Writes a log; a context manager. `event` may be called by any thread, and costs microseconds.

    Events are of any kind. Those of kind ``failed``, which say the ``key`` of an image and the ``reason``, are counted
    and kept for the summary, `MAX_FAILED` at most.

    Args:
        objects: of the store.
        facts: what is to be done, plain JSON without secrets.
        note: told, once, that the log cannot be written.
        beat: called before each part, in a thread of the log; logs how far things are.
        part_seconds: time between two parts.
    """

    def __init__(
        self,
        objects: Objects,
        facts: Mapping[str, Any],
        *,
        note: Callable[[str], None] | None = None,
        beat: Callable[[], None] | None = None,
        part_seconds: float = PART_SECONDS,
    ) -> None:
        self._objects = objects
        self._note = note
        self._beat = beat
        self._part_seconds = part_seconds
        self._begin = time.time()
        moment = datetime.datetime.fromtimestamp(self._begin, datetime.UTC)
        self.id = f"{moment:%Y%m%dT%H%M%S}.{moment.microsecond // 1000:03d}Z-{secrets.token_hex(4)}"
        self._facts = dict(facts)
        self._who = _who()
        self._guard = threading.Lock()
        self._writing = threading.Lock()
        self._part, self._parts = Lines(_SINGLE), Lines(_SINGLE_OF_PARTS)
        self._number = self._first = 0
        self._failed: list[dict[str, str]] = []
        self._failures = 0
        self._concluded: dict[str, Any] = {}
        self._troubled = False
        self._full, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="featstore-log", daemon=True)

    def __enter__(self) -> Self:
        self.event("start", format=FORMAT, id=self.id, **self._who, **self._facts)
        self._flush()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._full.set()
        self._thread.join()
        outcome = "done" if value is None else "failed" if isinstance(value, Exception) else "interrupted"
        error = {} if value is None else {"error": f"{type(value).__name__}: {value}"[:_MAX_REASON]}
        self._ask()
        self.event("end", outcome=outcome, **error)
        self._flush()
        summary = json.dumps(self._summary(outcome, error), indent=1, default=str).encode()
        self._try(lambda: self._put(SUMMARY, summary))

    def event(self, kind: str, **facts: Any) -> None:
        """Log that something happened.

        Args:
            kind: what; a word.
            facts: plain JSON.
        """
        moment = _text(time.time())
        with self._guard:
            if kind == "failed":
                self._failures += 1
                if len(self._failed) < MAX_FAILED:
                    self._failed.append({name: str(value)[:_MAX_REASON] for name, value in facts.items()})
            self._part.add(moment, kind, facts)
            self._parts.add(moment, kind, facts)
            full = len(self._part) >= _PART_LINES
        if full:
            self._full.set()

    def conclude(self, **facts: Any) -> None:
        """Facts that the summary is to hold, such as how much was ``computed`` and ``reused``; the last word counts."""
        with self._guard:
            self._concluded |= facts

    def _summary(self, outcome: str, error: Mapping[str, Any]) -> dict[str, Any]:
        end = time.time()
        return {
            "format": FORMAT,
            "id": self.id,
            "outcome": outcome,
            **error,
            "start": _text(self._begin),
            "end": _text(end),
            "seconds": end - self._begin,
            **self._who,
            **self._facts,
            **self._concluded,
            "failed": {"count": self._failures, "images": self._failed},
        }

    def _work(self) -> None:
        while not self._over.is_set():
            self._full.wait(self._part_seconds)
            self._full.clear()
            if not self._over.is_set():
                self._ask()
                self._flush()

    def _ask(self) -> None:
        if self._beat is not None:
            with contextlib.suppress(RuntimeError):  # It looked at what another thread was changing: the next time.
                self._beat()

    def _flush(self) -> None:
        """Put what has happened since the last part."""
        with self._writing:
            parts = None
            with self._guard:
                part, self._part = self._part, Lines(_SINGLE)
                if self._number + 1 - self._first >= _PARTS:
                    parts, self._parts = self._parts, Lines(_SINGLE_OF_PARTS)
            if len(part):
                self._try(lambda: self._put_part(part.body()))
            if parts is not None:
                self._try(lambda: self._put_parts(parts.body()))

    def _put_part(self, body: bytes) -> None:
        self._put(f"{self._number:06d}.jsonl", body)
        self._number += 1

    def _put_parts(self, body: bytes) -> None:
        """Put one object in the place of the last parts, and delete them; a reader passes over those that are left."""
        first, self._first = self._first, self._number
        self._put(f"{first:06d}-{self._number - 1:06d}.jsonl", body)
        for number in range(first, self._number):
            self._objects.delete(f"{FOLDER}/{self.id}/{number:06d}.jsonl", durable=False)

    def _put(self, name: str, body: bytes) -> None:
        self._objects.put_new(f"{FOLDER}/{self.id}/{name}", body, durable=False)

    def _try(self, put: Callable[[], None]) -> None:
        try:
            put()
        except (FeatstoreError, OSError) as error:
            if not self._troubled and self._note is not None:
                self._note(f"the log of this extraction cannot be written, which does not stop it: {error}")
            self._troubled = True


def _text(moment: float) -> str:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat(timespec="milliseconds")


def _who() -> dict[str, Any]:
    """This process, in words that tell later whether it still lives."""
    pid, user = os.getpid(), "unknown"
    with contextlib.suppress(KeyError, OSError):  # no such user in a container
        user = getpass.getuser()
    return {
        "host": socket.gethostname(),
        "user": user,
        "pid": pid,
        "place": partial.place(),
        "started": partial.started(pid),
    }

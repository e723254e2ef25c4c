"""Reading the logs of extractions; see `featstore.store.run_log` for where they lie."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import time
from collections.abc import Iterator
from typing import Any

from featstore.errors import CorruptError, NotFoundError, unknown_name
from featstore.store import partial
from featstore.store.objects import Objects
from featstore.store.run_log import FOLDER, PART_SECONDS, SUMMARY

_NAME = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{8}")
_PART = re.compile(r"(\d{6,9})(?:-(\d{6,9}))?\.jsonl")
_MAX_BYTES = 64 << 20
_SILENT_SECONDS = 5 * PART_SECONDS
"""Time without a part after which a process that cannot be asked about is taken for gone."""

RUNNING, KILLED = "running", "killed"
STATES = ("done", "failed", "interrupted", RUNNING, KILLED)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One extraction, as its log says."""

    id: str
    state: str
    """One of `STATES`. Without a summary, an extraction of this machine is running or was killed; one of another
    machine counts as killed when nothing was heard of it for five minutes."""
    facts: dict[str, Any]
    """The summary; where there is none, what was known at the start."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"id": self.id, "state": self.state, **self.facts}


def log_ids(objects: Objects) -> list[str]:
    """Names of all logs, the newest first.

    Raises:
        StorageError: if the place cannot be listed, as over HTTP.
    """
    return [name for name in reversed(objects.names(FOLDER)) if _NAME.fullmatch(name)]


def log_entries(objects: Objects, *, limit: int) -> list[LogEntry]:
    """The newest logs, the newest first; errors of `log_ids`."""
    return [log_entry(objects, name) for name in log_ids(objects)[:limit]]


def log_entry(objects: Objects, name: str) -> LogEntry:
    """One log; of one that is damaged, that it is there."""
    summary = _document(objects, f"{FOLDER}/{name}/{SUMMARY}")
    if summary is not None:
        state = summary.get("outcome")
        return LogEntry(id=name, state=state if state in STATES else KILLED, facts=summary)
    parts = _parts(objects, name)
    start = next(_lines(objects, name, parts[:1]), {})
    facts = {key: value for key, value in start.items() if key not in ("kind", "time")}
    facts["start"] = start.get("time")
    return LogEntry(id=name, state=RUNNING if _lives(objects, name, parts, facts) else KILLED, facts=facts)


def find_log(objects: Objects, beginning: str) -> str:
    """The name of the log that begins, or ends, with ``beginning``.

    Raises:
        NotFoundError: if there are no logs.
        BadRequestError: if none fits, or several do.
    """
    there = log_ids(objects)
    if not there:
        raise NotFoundError(f"store {objects.url!r} has no logs", hint="every `featstore extract` leaves one")
    fitting = [name for name in there if beginning and (name.startswith(beginning) or name.endswith(beginning))]
    if len(fitting) != 1:
        raise unknown_name("log", beginning, fitting or there)
    return fitting[0]


def log_lines(objects: Objects, name: str) -> Iterator[dict[str, Any]]:
    """The lines of a log, in order; what is no JSON object is passed over."""
    return _lines(objects, name, _parts(objects, name))


def _parts(objects: Objects, name: str) -> list[str]:
    """Names of a log's parts, in order, without those that another one holds."""
    found = [match for one in objects.names(f"{FOLDER}/{name}") if (match := _PART.fullmatch(one))]
    spans = sorted((int(match[1]), -int(match[2] or match[1]), match[0]) for match in found)
    parts, covered = [], -1
    for first, last, part in spans:
        if first > covered:
            parts.append(part)
            covered = -last
    return parts


def _lines(objects: Objects, name: str, parts: list[str]) -> Iterator[dict[str, Any]]:
    for part in parts:
        try:
            body = objects.get(f"{FOLDER}/{name}/{part}", max_bytes=_MAX_BYTES)
        except (NotFoundError, CorruptError):
            continue  # put together with others meanwhile, or nothing that we wrote
        for line in body.splitlines():
            value = _parsed(line)
            if value is not None:
                yield value


def _document(objects: Objects, key: str) -> dict[str, Any] | None:
    try:
        return _parsed(objects.get(key, max_bytes=_MAX_BYTES))
    except (NotFoundError, CorruptError):
        return None


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _lives(objects: Objects, name: str, parts: list[str], facts: dict[str, Any]) -> bool:
    """Whether the extraction goes on, as far as can be known."""
    pid, started = facts.get("pid"), facts.get("started")
    if facts.get("place") == partial.place() and isinstance(pid, int) and isinstance(started, int):
        return partial.lives(pid, started)
    heard = 0.0
    for line in _lines(objects, name, parts[-1:]):
        heard = max(heard, _moment(line.get("time")))
    return time.time() - heard < _SILENT_SECONDS


def _moment(text: object) -> float:
    """Unix time in seconds of an ISO text; 0 if it is none."""
    try:
        return datetime.datetime.fromisoformat(str(text)).timestamp()
    except (ValueError, OverflowError):
        return 0.0

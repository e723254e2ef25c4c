"""Lines of a run log: the first of a kind one by one, the others of that kind added up, so that a log stays small.

However many blocks there are: of each kind of event a `Lines` keeps so many lines as they are, and beyond them one line
a kind and worker, with how many there were, the sums of their figures and the largest of each.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

MAX_LINE_BYTES = 64 << 10
"""Bytes of a line beyond which its facts are cut."""
_MAX_TEXT = 500
_MAX_FOLDED = 4096
"""Pairs of kind and worker that are added up apart; what comes after them shares one line a kind."""


@dataclasses.dataclass(slots=True)
class _Folded:
    """Events of one kind and worker, added up."""

    first: str
    last: str = ""
    count: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    largest: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, time: str, facts: Mapping[str, Any]) -> None:
        self.last = time
        self.count += 1
        for name, value in facts.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self.sums[name] = self.sums.get(name, 0) + value
                self.largest[name] = max(self.largest.get(name, value), value)


class Lines:
    """Events that become lines of JSON.

    Args:
        single: how many of each kind are kept one by one.
    """

    def __init__(self, single: int) -> None:
        self._single = single
        self._counts: Counter[str] = Counter()
        self._lines: list[bytes] = []
        self._folded: dict[tuple[str, str], _Folded] = {}

    def __len__(self) -> int:
        return len(self._lines) + len(self._folded)

    def add(self, time: str, kind: str, facts: Mapping[str, Any]) -> None:
        """Take one event.

        Args:
            time: ISO 8601, UTC.
            kind: what happened.
            facts: plain JSON; ``worker`` says whom figures are added up for.
        """
        self._counts[kind] += 1
        if self._counts[kind] <= self._single:
            self._lines.append(line({"time": time, "kind": kind, **facts}))
            return
        whose = (kind, str(facts.get("worker", ""))[:_MAX_TEXT])
        if whose not in self._folded and len(self._folded) >= _MAX_FOLDED:
            whose = (kind, "others")
        self._folded.setdefault(whose, _Folded(time)).add(time, facts)

    def body(self) -> bytes:
        """All of it, a line each."""
        folded = [
            line(
                {
                    "time": one.last,
                    "kind": kind,
                    **({"worker": worker} if worker else {}),
                    "count": one.count,
                    "since": one.first,
                    "sum": one.sums,
                    "max": one.largest,
                }
            )
            for (kind, worker), one in self._folded.items()
        ]
        return b"".join([*self._lines, *folded])


def line(facts: Mapping[str, Any]) -> bytes:
    """``facts`` as one line of JSON, whatever they are: what JSON cannot say is said as text, what is long is cut."""
    body = _dumped(facts)
    if len(body) > MAX_LINE_BYTES:
        body = _dumped({name: _short(value) for name, value in facts.items()} | {"cut": True})
    return body + b"\n"


def _dumped(facts: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(facts, default=str, allow_nan=False, skipkeys=True)
    except ValueError:  # NaN or infinity, or a value that holds itself
        text = json.dumps({str(name): str(value)[:_MAX_TEXT] for name, value in facts.items()})
    return text.encode()


def _short(value: Any) -> Any:
    if isinstance(value, bool | int | float) or value is None:
        return value
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}.."

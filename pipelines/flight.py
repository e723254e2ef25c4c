"""Maps between the device and the writer: taken as copies under way, handed on when they have arrived."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from featstore.pipelines.outcome import RunOutcome
from featstore.pipelines.plan import Plan
from featstore.pipelines.progress import Progress
from featstore.pipelines.rates import Rates
from featstore.pipelines.writing import BlockWriter

if TYPE_CHECKING:
    from featstore.extraction.host import HostMaps


@dataclasses.dataclass(frozen=True, slots=True)
class InFlight:
    """The maps of one run's share of a block."""

    outcome: RunOutcome
    block: int
    positions: np.ndarray
    """In ``plan.wanted`` (n,)."""
    keys: Sequence[str]
    maps: HostMaps


class Flight:
    """Hands maps to the writer one pass late, so that the device has its next pass before anyone waits."""

    def __init__(self, plan: Plan, writer: BlockWriter, rates: Rates, progress: Progress) -> None:
        self._plan = plan
        self._writer = writer
        self._rates = rates
        self._progress = progress
        self._last: InFlight | None = None
        self._since = time.perf_counter()

    def unreadable(self, outcome: RunOutcome, key: str, reason: str) -> None:
        """Note an image that could not be read for one run."""
        outcome.failed[key] = reason
        self._progress.advance()

    def take(self, maps: InFlight) -> None:
        """Let the maps before these land."""
        before, self._last = self._last, maps
        if before is not None:
            self._land(before)

    def land(self) -> None:
        """Let the last maps land."""
        if self._last is not None:
            self._land(self._last)
            self._last = None

    def _land(self, one: InFlight) -> None:
        maps, bad = one.maps.wait()
        now = time.perf_counter()
        self._rates.record(Rates.key(one.outcome.planned.recipe, self._plan.device), len(one.keys), now - self._since)
        self._since = now
        for row, reason in bad.items():
            one.outcome.failed[one.keys[row]] = reason
        self._submit(one, maps, bad)
        one.outcome.computed += len(one.keys) - len(bad)
        self._progress.advance(len(one.keys))

    def _submit(self, one: InFlight, maps: Mapping[str, np.ndarray], bad: Collection[int]) -> None:
        """Hand the layers that lack rows to the writer; the store leaves rows that a layer has already as they are."""
        good = np.array([row for row in range(len(one.positions)) if row not in bad], dtype=int)
        rows = one.outcome.rows[one.positions[good]].tolist()
        missing = one.outcome.planned.missing
        lacking = [name for name, mask in missing.items() if mask[one.positions[good]].any()]
        if lacking:
            whole = len(good) == len(one.positions)
            stored = {name: maps[name] if whole else maps[name][good] for name in lacking}
            self._writer.submit(one.outcome.run, one.block, rows, stored)

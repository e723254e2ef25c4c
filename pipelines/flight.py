"""Maps between the device and the writer: taken as copies under way, handed on when they have arrived."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from featstore.pipelines.claims import Claims, Share
from featstore.pipelines.plan import Plan
from featstore.pipelines.progress import Progress
from featstore.pipelines.rates import Rates
from featstore.pipelines.writing import BlockWriter
from featstore.store.precision import StoredMaps

if TYPE_CHECKING:
    from featstore.extraction.host import HostMaps


@dataclasses.dataclass(frozen=True, slots=True)
class InFlight:
    """The maps of one run's share of a block."""

    share: Share
    block: int
    positions: np.ndarray
    """In ``plan.wanted`` (n,): those of the share whose images could be read."""
    keys: Sequence[str]
    maps: HostMaps


class Flight:
    """Hands maps to the writer one pass late, so that the device has its next pass before anyone waits."""

    def __init__(self, plan: Plan, claims: Claims, writer: BlockWriter, rates: Rates, progress: Progress) -> None:
        self._plan = plan
        self._claims = claims
        self._writer = writer
        self._rates = rates
        self._progress = progress
        self._last: InFlight | None = None
        self._since = time.perf_counter()

    def unreadable(self, share: Share, position: int, reason: str) -> None:
        """Note an image that could not be read for one run."""
        share.outcome.failed[self._plan.dataset.samples[self._plan.wanted[position]].key] = reason
        share.outcome.done(np.array([position]))
        self._progress.advance()

    def empty(self, share: Share) -> None:
        """Note a share of which no image could be read."""
        self._claims.release(share.lease)

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
        outcome = one.share.outcome
        now = time.perf_counter()
        self._rates.record(Rates.key(outcome.planned.recipe, self._plan.device), len(one.keys), now - self._since)
        self._since = now
        for row, reason in bad.items():
            outcome.failed[one.keys[row]] = reason
        self._submit(one, maps, bad)
        outcome.computed += len(one.keys) - len(bad)
        outcome.done(one.positions)
        self._progress.advance(len(one.keys))

    def _submit(self, one: InFlight, maps: Mapping[str, StoredMaps], bad: Collection[int]) -> None:
        """Hand the layers that lack rows to the writer; the store leaves rows that a layer has already as they are."""
        good = np.array([row for row in range(len(one.positions)) if row not in bad], dtype=int)
        outcome, lease = one.share.outcome, one.share.lease
        rows = outcome.rows[one.positions[good]].tolist()
        lacking = [name for name, mask in outcome.missing.items() if mask[one.positions[good]].any()]
        if not lacking:
            self._claims.release(lease)
            return
        whole = len(good) == len(one.positions)
        stored = {name: maps[name] if whole else maps[name][good] for name in lacking}
        self._writer.submit(outcome.run, one.block, rows, stored, lambda: self._claims.release(lease))

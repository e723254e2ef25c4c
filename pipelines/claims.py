"""Which blocks of an extraction are ours: a lease on each, and a second look at what it still lacks.

Several processes that extract the same runs share the work this way. A block that somebody else holds is put off, and
looked at again when everything else is done: by then it is complete, or its holder is gone and it is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from featstore.pipelines.outcome import RunOutcome
from featstore.store.leases import Holder, Keeper, Lease, acquire


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """What one run lacks of a block, held by a lease."""

    outcome: RunOutcome
    lease: Lease
    positions: np.ndarray
    """In ``plan.wanted`` (n,), in the order of their rows."""


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """A block to be done for some runs of one block length."""

    block: int
    outcomes: tuple[RunOutcome, ...]


class Claims:
    """Takes leases on blocks and keeps them alive.

    Args:
        keeper: renews the leases; gives them back at the end, whatever happens.
        job: the distributed extraction that they are for; see `acquire`.
    """

    def __init__(self, keeper: Keeper, job: str = "") -> None:
        self._keeper = keeper
        self._job = job
        self.postponed: list[Work] = []
        """Blocks that others hold."""
        self.holders: dict[str, Holder] = {}
        """Who holds them, by what they call themselves."""
        self.spared = 0
        """Passes that others have made since the plan was, and that nobody has counted yet."""

    def take(self, work: Work) -> list[Share]:
        """What is ours of a block: the runs whose lease is got and that lack something still."""
        shares, busy = [], []
        for outcome in work.outcomes:
            positions = outcome.lacking(work.block)
            if not len(positions):
                continue
            got = acquire(outcome.run.dataset.objects, outcome.run.path, work.block, self._job)
            if isinstance(got, Holder):
                busy.append(outcome)
                self.holders[str(got)] = got
                continue
            self._keeper.keep(got)
            # Another process may have committed rows between the plan and the lease.
            lacking = positions[outcome.look_again(work.block, positions)]
            self.spared += len(positions) - len(lacking)
            if len(lacking):
                shares.append(Share(outcome, got, lacking))
            else:
                self._keeper.release(got)
        if busy:
            self.postponed.append(Work(work.block, tuple(busy)))
        return shares

    def release(self, lease: Lease) -> None:
        """Give a block back: it is committed, or nothing of it can be."""
        self._keeper.release(lease)

    def again(self) -> list[Work]:
        """The blocks that were put off, to be tried once more."""
        work, self.postponed = self.postponed, []
        return work


def all_work(group: Sequence[RunOutcome]) -> list[Work]:
    """Every block in which a run of ``group``, runs of one block length and rows, has something to do."""
    blocks = np.unique(np.concatenate([outcome.blocks[outcome.todo] for outcome in group])).tolist()
    return [Work(block, tuple(group)) for block in blocks]

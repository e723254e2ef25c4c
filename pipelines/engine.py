"""Where the passes of an extraction run: in this process (`featstore.pipelines.here`) or on a cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from featstore.pipelines.outcome import RunOutcome
from featstore.pipelines.plan import Plan
from featstore.pipelines.progress import Progress
from featstore.store.basis import Basis


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """What one process of several did."""

    name: str
    """Its address."""
    passes: int
    """Forward passes whose features it stored."""
    seconds: float
    """From its first block to its last."""
    peak_rss_bytes: int
    peak_device_bytes: int | None
    """Largest memory taken on its GPU; None: none was used."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        device = {} if self.peak_device_bytes is None else {"peak_device_bytes": self.peak_device_bytes}
        return {
            "name": self.name,
            "passes": self.passes,
            "passes_per_second": self.passes / self.seconds if self.seconds > 0 else 0.0,
            "peak_rss_bytes": self.peak_rss_bytes,
            **device,
        }


class Engine(Protocol):
    """Runs the passes of one plan; a context manager that lets go of the model."""

    def __enter__(self) -> Self:
        """Get ready: what is needed is there, or this fails."""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of everything."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the passes of new runs run on: ``device``, ``hardware``, ``cpu_threads``."""

    def batch_size(self) -> int:
        """Rows of every forward pass of the plan's new runs."""

    def fit(self, sizes: Sequence[int], progress: Progress) -> list[dict[str, Basis]]:
        """What reduces the new layers of each of the plan's runs, of which ``sizes`` are the batch sizes."""

    def compute(self, outcomes: Sequence[RunOutcome], progress: Progress) -> None:
        """Run all passes that ``outcomes``, the plan's runs in their order, lack."""

    @property
    def workers(self) -> Sequence[WorkerReport]:
        """What other processes did; empty where this one did all."""

    @property
    def retries(self) -> int:
        """Blocks that were tried again."""

    @property
    def peak_device_bytes(self) -> int | None:
        """Largest memory taken on a GPU; None: none was used."""


def new_runs(plan: Plan) -> bool:
    """Whether the plan has runs that the store does not have."""
    return any(planned.run is None for planned in plan.runs)

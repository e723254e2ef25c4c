"""What became of one run of a plan."""

from __future__ import annotations

import dataclasses

import numpy as np

from featstore.pipelines.plan import PlannedRun
from featstore.store import Run


@dataclasses.dataclass(slots=True)
class RunOutcome:
    """One run of the plan, while and after it is made."""

    planned: PlannedRun
    run: Run
    rows: np.ndarray
    """Row in the store's table of each wanted image."""
    computed: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    """Keys of images that could not be extracted, each with the reason."""

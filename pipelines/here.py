"""Extraction in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from featstore.pipelines.batch import cpu_batch_size, probed_batch_size_of
from featstore.pipelines.compute import compute
from featstore.pipelines.engine import WorkerReport
from featstore.pipelines.outcome import RunOutcome
from featstore.pipelines.plan import Plan
from featstore.pipelines.progress import Progress
from featstore.pipelines.provenance import cpu_name
from featstore.pipelines.reduction import fit
from featstore.store.basis import Basis

if TYPE_CHECKING:
    from featstore.models.backbones.base import Backbone


class Here:
    """Loads the plan's model into this process, if anything is to be computed; an `Engine`.

    Args:
        plan: what to do.
        backbone: the plan's model if it is loaded already; it is then left open.
    """

    def __init__(self, plan: Plan, backbone: Backbone | None = None) -> None:
        self._plan = plan
        self._model = backbone
        self._own: Backbone | None = None

    def __enter__(self) -> Self:
        plan = self._plan
        if plan.passes_todo and self._model is None:
            self._model = self._own = plan.source.load(plan.device, plan.runs[0].recipe.compute_dtype)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own is not None:
            self._own.close()

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the passes run on."""
        plan, threads = self._plan, None
        if plan.device == "cpu":
            if plan.passes_todo:
                import torch

                threads = torch.get_num_threads()
            return {"device": plan.device, "hardware": cpu_name(), "cpu_threads": threads}
        import torch

        return {"device": plan.device, "hardware": torch.cuda.get_device_name(plan.device), "cpu_threads": threads}

    def batch_size(self) -> int:
        """Rows of every forward pass of new runs: what fits a GPU."""
        plan, recipe = self._plan, self._plan.runs[0].recipe
        if self._model is None or plan.device == "cpu":
            return cpu_batch_size(plan.source, recipe.height_px, recipe.width_px)
        return probed_batch_size_of([one for one in plan.runs if one.run is None], self._model)

    def fit(self, sizes: Sequence[int], progress: Progress) -> list[dict[str, Basis]]:
        """What reduces the new layers of each run."""
        plan, model = self._plan, self._model
        if model is None:
            return [{} for _ in plan.runs]
        return [fit(plan.dataset, one, model, size, progress) for one, size in zip(plan.runs, sizes, strict=True)]

    def compute(self, outcomes: Sequence[RunOutcome], progress: Progress) -> None:
        """Run all passes that the runs lack."""
        assert self._model is not None
        compute(self._plan, outcomes, self._model, progress)

    @property
    def workers(self) -> Sequence[WorkerReport]:
        """None: this process does all."""
        return ()

    @property
    def retries(self) -> int:
        """None: what fails here ends the extraction."""
        return 0

    @property
    def peak_device_bytes(self) -> int | None:
        """Largest memory that this process took on the plan's GPU; None on a CPU, and where nothing was computed."""
        if self._plan.device == "cpu" or not self._plan.passes_todo:
            return None
        import torch

        return torch.cuda.max_memory_allocated(self._plan.device)

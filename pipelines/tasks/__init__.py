"""The tasks that heads are trained for. A new one is one module and one line here."""

from __future__ import annotations

from featstore.pipelines.tasks import segmentation
from featstore.pipelines.tasks.base import TaskKind
from featstore.registry import Registry

TASKS: Registry[TaskKind] = Registry("task")
TASKS.register(
    "segmentation",
    TaskKind(
        title="parts of objects from few labelled images",
        heads=("pixel",),
        metrics=segmentation.METRICS,
        prepare=segmentation.Segmentation,
    ),
)

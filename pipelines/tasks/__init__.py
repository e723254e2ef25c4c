"""The tasks that heads are trained for. A new one is one module and one line here."""

from __future__ import annotations

from featstore.pipelines.tasks import classification, correspondence, segmentation
from featstore.pipelines.tasks.base import TaskKind
from featstore.registry import Registry

TASKS: Registry[TaskKind] = Registry("task")
TASKS.register(
    "segmentation",
    TaskKind(
        title="labels of pixels: parts of objects from few images (pixel), whole scenes (upernet)",
        heads=("pixel", "upernet"),
        metrics=segmentation.METRICS,
        prepare=segmentation.Segmentation,
        predict=segmentation.predict,
    ),
)
TASKS.register(
    "correspondence",
    TaskKind(
        title="the same points in two images of one category",
        heads=("conv", "nn"),
        metrics=correspondence.METRICS,
        prepare=correspondence.Correspondence,
    ),
)
TASKS.register(
    "classification",
    TaskKind(
        title="what a whole image shows",
        heads=("conv", "linear"),
        metrics=classification.METRICS,
        prepare=classification.Classification,
        baselines=("resnet50",),
        predict=classification.predict,
    ),
)

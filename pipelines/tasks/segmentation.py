"""Label-scarce segmentation with an ensemble of pixel heads, as train-head and evaluate run it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from featstore.datasets import UnreadableImageError, resize_mask
from featstore.errors import BadRequestError, IncompatibleError
from featstore.heads.splits import Split
from featstore.pipelines.progress import Progress
from featstore.pipelines.reading import OpenBucket
from featstore.pipelines.tasks.base import HeadSettings, LabelledRows, PreparedTask, StepProgress

if TYPE_CHECKING:
    from featstore.heads import Head, SegmentationResult, SegmentationTask

METRICS = ("miou", "accuracy")


class Segmentation(PreparedTask):
    """Label maps of a data set on the grid that heads are trained and scored on."""

    def __init__(self, bucket: OpenBucket, rows: LabelledRows, progress: Progress) -> None:
        labels = read_labels(bucket, progress)
        self.bucket = dataclasses.replace(bucket, classes=class_names(bucket, labels))
        self.usable = rows.usable(bucket, labels, progress)
        self.masks = on_rows(bucket, labels, self.usable)

    def task(self, train: np.ndarray, test: np.ndarray) -> SegmentationTask:
        """The problem of one split."""
        from featstore.heads import SegmentationTask

        return SegmentationTask(
            features=self.features(),
            masks=self.masks,
            train_rows=train.tolist(),
            test_rows=test.tolist(),
            classes=self.bucket.classes,
            ignore_label=self.bucket.dataset.info.ignore_label,
        )

    @override
    def train(self, split: Split, settings: HeadSettings, progress: Progress, title: str) -> SegmentationResult:
        from featstore.heads import PixelHeadConfig, train_segmentation

        config = PixelHeadConfig(members=settings.ensemble, assigners=settings.assigners, max_steps=settings.max_steps)
        with StepProgress(progress, title) as advance:
            return train_segmentation(
                self.task(*split), config, seed=settings.seed, device=settings.device, progress=advance
            )

    @override
    def score(self, head: Head, rows: np.ndarray, progress: Progress) -> dict[str, Any]:
        from featstore.heads.head import PixelHead
        from featstore.heads.segmentation import score

        if not isinstance(head, PixelHead) or head.spec.classes != self.bucket.classes:
            raise IncompatibleError(
                f"a {head.kind!r} head of other classes cannot be scored on {self.bucket.dataset.info.name!r}",
                hint="evaluate on the data set that the head was trained on",
            )
        return score(self.task(rows[:0], rows), head).metrics


def read_labels(bucket: OpenBucket, progress: Progress) -> dict[str, np.ndarray]:
    """Label maps uint8 by key, on the grid that heads are trained and scored on, where an image has one."""
    info, recipe = bucket.dataset.info, bucket.runs[0].recipe
    height, width = (info.label_size_px,) * 2 if info.label_size_px else (recipe.height_px, recipe.width_px)
    labels = {}
    for sample in bucket.dataset.samples:
        try:
            mask = bucket.dataset.mask(sample.key)
        except UnreadableImageError as error:
            progress.note(f"left out: the labels of {sample.key!r} cannot be read: {error}")
            continue
        if mask is not None:
            labels[sample.key] = resize_mask(mask, height, width)
    if not labels:
        raise BadRequestError(
            f"data set {info.name!r} has no labels",
            hint="put masks beside the images: IMAGE.npy, IMAGE_mask.png or a folder masks/",
        )
    return labels


def class_names(bucket: OpenBucket, labels: dict[str, np.ndarray]) -> tuple[str, ...]:
    """The data set's class names; where it has none, as folders, 0, 1, .. up to the highest label."""
    ignore = bucket.dataset.info.ignore_label
    highest = {key: int(mask[mask != ignore].max(initial=0)) for key, mask in labels.items()}
    classes = bucket.dataset.info.classes or tuple(map(str, range(max(highest.values()) + 1)))
    for key, label in highest.items():
        if label >= len(classes):
            raise BadRequestError(
                f"the labels of {key!r} hold {label}, which is outside 0..{len(classes) - 1} and not {ignore}",
                hint=f"data set {bucket.dataset.info.name!r} has {len(classes)} classes",
            )
    return classes


def on_rows(bucket: OpenBucket, labels: dict[str, np.ndarray], usable: np.ndarray) -> np.ndarray:
    """Label maps (N, h, w) uint8 of the store's rows; the ignored label where a row is not usable."""
    height, width = next(iter(labels.values())).shape
    masks = np.full((len(usable), height, width), bucket.dataset.info.ignore_label, dtype=np.uint8)
    for row in np.flatnonzero(usable):
        masks[row] = labels[bucket.stored.samples.keys[row]]
    return masks

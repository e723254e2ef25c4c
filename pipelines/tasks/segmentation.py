"""Segmentation as train-head and evaluate run it: pixel heads on few labelled images, UPerNet on whole ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from typing_extensions import override

from featstore.datasets import Sample, UnreadableImageError, resize_mask
from featstore.errors import BadRequestError, IncompatibleError
from featstore.heads.splits import Split
from featstore.pipelines.gathering import gather_sample
from featstore.pipelines.progress import Progress
from featstore.pipelines.reading import OpenBucket
from featstore.pipelines.tasks.base import HeadSettings, LabelledRows, PreparedTask, Result, StepProgress

if TYPE_CHECKING:
    from featstore.heads import Head, Prediction, SegmentationTask
    from featstore.heads.labels import PackedLabels, PackedMap
    from featstore.heads.sampled import PixelSample
    from featstore.heads.upernet import MapPrediction

METRICS = ("miou", "accuracy", "macc")
_MANY_LABELS = 1000
"""From so many images on, reading their labels shows a bar."""


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
    def train(self, split: Split, settings: HeadSettings, progress: Progress, title: str) -> Result:
        task = self.task(*split)
        sample = None
        if settings.pixels_per_image is not None:
            count, seed = settings.pixels_per_image, settings.seed
            sample = gather_sample(self.bucket, task, count, seed=seed, cluster=settings.cluster, progress=progress)
        with StepProgress(progress, title) as advance:
            if settings.head == "upernet":
                return _train_upernet(task, settings, advance)
            return _train_pixel(task, settings, advance, sample)

    @override
    def score(self, head: Head, rows: np.ndarray, progress: Progress) -> dict[str, Any]:
        from featstore.heads import segmentation, semantic
        from featstore.heads.head import PixelHead
        from featstore.heads.upernet import UPerNetHead

        if isinstance(head, PixelHead | UPerNetHead) and head.spec.classes == self.bucket.classes:
            task = self.task(rows[:0], rows)
            if isinstance(head, PixelHead):
                return segmentation.score(task, head).metrics
            return semantic.score(task, head).metrics
        raise IncompatibleError(
            f"a {head.kind!r} head of other classes cannot be scored on {self.bucket.dataset.info.name!r}",
            hint="evaluate on the data set that the head was trained on",
        )


def _train_pixel(
    task: SegmentationTask, settings: HeadSettings, advance: StepProgress, sample: PixelSample | None
) -> Result:
    from featstore.heads import PixelHeadConfig, train_segmentation

    if sample is None:
        _require_memory(task)
    config = PixelHeadConfig(
        members=settings.ensemble,
        assigners=settings.assigners,
        per_channel=settings.per_channel,
        max_steps=settings.max_steps,
    )
    return train_segmentation(task, config, seed=settings.seed, device=settings.device, progress=advance, sample=sample)


def _require_memory(task: SegmentationTask) -> None:
    """Refuse training maps that do not fit into memory, where a pixel head holds them at their native sizes.

    Raises:
        BadRequestError: before anything is read.
    """
    needed = sum(array[0].size * array.dtype.itemsize * len(task.train_rows) for _, array in task.features.arrays())
    free = psutil.virtual_memory().available
    if needed > free:
        raise BadRequestError(
            f"a pixel head holds the maps of its {len(task.train_rows)} training images, {needed / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB of memory are free",
            hint="--pixels-per-image 256 holds that many pixels of each instead; --head upernet reads maps in batches",
        )


def _train_upernet(task: SegmentationTask, settings: HeadSettings, advance: StepProgress) -> Result:
    from featstore.heads.semantic import train_semantic
    from featstore.heads.upernet import UPerNetHeadConfig

    config = UPerNetHeadConfig(
        assigners=settings.assigners, per_channel=settings.per_channel, max_steps=settings.max_steps
    )
    return train_semantic(task, config, seed=settings.seed, device=settings.device, progress=advance)


def read_labels(bucket: OpenBucket, progress: Progress) -> dict[str, PackedMap]:
    """Label maps by key, on the grid that heads are trained and scored on, where an image has one."""
    from featstore.heads.labels import PackedMap

    info, recipe = bucket.dataset.info, bucket.runs[0].recipe
    height, width = (info.label_size_px,) * 2 if info.label_size_px else (recipe.height_px, recipe.width_px)
    labels = {}
    for sample in _watched(bucket.dataset.samples, progress):
        try:
            mask = bucket.dataset.mask(sample.key)
        except UnreadableImageError as error:
            progress.note(f"left out: the labels of {sample.key!r} cannot be read: {error}")
            continue
        if mask is not None:
            labels[sample.key] = PackedMap(resize_mask(mask, height, width))
    if not labels:
        raise BadRequestError(
            f"data set {info.name!r} has no labels",
            hint="put masks beside the images: IMAGE.npy, IMAGE_mask.png or a folder masks/",
        )
    return labels


def _watched(samples: Sequence[Sample], progress: Progress) -> Iterator[Sample]:
    """The samples, with a bar where they are many."""
    if len(samples) < _MANY_LABELS:
        yield from samples
        return
    progress.start("reading labels", len(samples), "images")
    try:
        for sample in samples:
            yield sample
            progress.advance()
    finally:
        progress.stop()


def class_names(bucket: OpenBucket, labels: dict[str, PackedMap]) -> tuple[str, ...]:
    """The data set's class names; where it has none, as folders, 0, 1, .. up to the highest label."""
    ignore = bucket.dataset.info.ignore_label
    highest = {key: _highest(packed.open(), ignore) for key, packed in labels.items()}
    classes = bucket.dataset.info.classes or tuple(map(str, range(max(highest.values()) + 1)))
    for key, label in highest.items():
        if label >= len(classes):
            raise BadRequestError(
                f"the labels of {key!r} hold {label}, which is outside 0..{len(classes) - 1} and not {ignore}",
                hint=f"data set {bucket.dataset.info.name!r} has {len(classes)} classes",
            )
    return classes


def _highest(mask: np.ndarray, ignore: int) -> int:
    return int(mask[mask != ignore].max(initial=0))


def on_rows(bucket: OpenBucket, labels: dict[str, PackedMap], usable: np.ndarray) -> PackedLabels:
    """Label maps (N, h, w) of the store's rows; the ignored label where a row is not usable."""
    from featstore.heads.labels import PackedLabels

    rows = zip(bucket.stored.samples.keys, usable, strict=True)
    return PackedLabels(
        (labels[key] if use else None for key, use in rows),
        next(iter(labels.values())).size,
        ignore_label=bucket.dataset.info.ignore_label,
    )


def predict(head: Head, bucket: OpenBucket, rows: np.ndarray, out: Path, progress: Progress) -> dict[str, Any]:
    """Write labels, their overlay and the head's uncertainty for each row, as PNG files of the image's size.

    Returns:
        ``classes``, and for each of ``images`` its ``key``, ``files``, ``uncertainty`` (mean, nats) and the share
        of each class that occurs, ``classes``.
    """
    said_of, classes, most = _predictions(head, bucket, rows)
    keys = bucket.stored.samples.keys
    images = []
    progress.start("labelling", len(rows), "images")
    try:
        for here, said in said_of:
            for row, labels, doubt in zip(here, said.labels, said.uncertainty, strict=True):
                image = bucket.dataset.image(keys[row])
                files = _write(out / keys[row], image, labels, np.rint(255 * doubt / most).astype(np.uint8))
                shares = np.bincount(labels.reshape(-1), minlength=len(classes)) / labels.size
                occurring = {name: float(n) for name, n in zip(classes, shares, strict=True) if n}
                images.append(
                    {"key": keys[row], "files": files, "uncertainty": float(doubt.mean()), "classes": occurring}
                )
            progress.advance(len(here))
    finally:
        progress.stop()
    return {"classes": list(classes), "images": images}


def _predictions(
    head: Head, bucket: OpenBucket, rows: np.ndarray
) -> tuple[Iterable[tuple[np.ndarray, Prediction | MapPrediction]], tuple[str, ...], float]:
    """Rows and what the head says of them, its classes, and the highest uncertainty that it can have, in nats."""
    from featstore.heads import PixelHead, predict_rows, semantic
    from featstore.heads.upernet import UPerNetHead

    assert isinstance(head, PixelHead | UPerNetHead)
    features = bucket.features(np.isin(np.arange(len(bucket.stored.samples.keys)), rows))
    classes = head.spec.classes
    if isinstance(head, UPerNetHead):
        return semantic.predict_rows(features, head, rows), classes, math.log(len(classes))
    # members of two classes cannot differ by more than this
    return predict_rows(features, head, rows), classes, math.log(max(2, min(head.config.members, len(classes))))


def _write(path: Path, image: np.ndarray, labels: np.ndarray, doubt: np.ndarray) -> dict[str, str]:
    """The pictures of one image, beside each other under ``path``; their names by kind."""
    from featstore import pictures

    whole = resize_mask(labels, *image.shape[:2])
    made = {
        "labels": whole,
        "overlay": pictures.label_overlay(image, whole),
        "uncertainty": resize_mask(doubt, *image.shape[:2]),
    }
    return {
        kind: str(pictures.save_picture(path.with_name(f"{path.name}.{kind}.png"), picture))
        for kind, picture in made.items()
    }

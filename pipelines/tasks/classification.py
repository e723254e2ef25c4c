"""Classification of whole images, as train-head, evaluate and predict run it."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from featstore.errors import BadRequestError, IncompatibleError, StorageError
from featstore.heads.splits import Split
from featstore.pipelines.progress import Progress
from featstore.pipelines.reading import OpenBucket
from featstore.pipelines.tasks.base import HeadSettings, LabelledRows, PreparedTask, StepProgress

if TYPE_CHECKING:
    from featstore.heads import ClassificationResult, ClassificationTask, Head
    from featstore.pipelines.baseline import BaselineConfig

METRICS = ("accuracy", "mean_class_accuracy", "auroc", "average_precision", "calibration_error", "aurc")
TABLE = "classes.csv"
"""What `predict` writes: a line an image, with the probability of every class."""


class Classification(PreparedTask):
    """One label an image of a data set."""

    def __init__(self, bucket: OpenBucket, rows: LabelledRows, progress: Progress) -> None:
        labels = read_image_labels(bucket)
        self.bucket = dataclasses.replace(bucket, classes=bucket.dataset.info.image_classes)
        self.usable = rows.usable(bucket, labels, progress)
        keys = bucket.stored.samples.keys
        self.labels = np.array(
            [labels[key] if use else -1 for key, use in zip(keys, self.usable, strict=True)], dtype=np.int64
        )
        """(N,) int64 of the store's rows; -1 where a row is not usable."""

    def task(self, train: np.ndarray, test: np.ndarray) -> ClassificationTask:
        """The problem of one split."""
        from featstore.heads import ClassificationTask

        return ClassificationTask(
            features=self.features(),
            labels=self.labels,
            train_rows=train.tolist(),
            test_rows=test.tolist(),
            classes=self.bucket.classes,
        )

    @override
    def train(self, split: Split, settings: HeadSettings, progress: Progress, title: str) -> ClassificationResult:
        from featstore.heads import ClassificationConfig, train_classification

        config = ClassificationConfig(
            form=settings.head,
            assigners=settings.assigners,
            per_channel=settings.per_channel,
            max_steps=settings.max_steps,
        )
        with StepProgress(progress, title) as advance:
            return train_classification(
                self.task(*split), config, seed=settings.seed, device=settings.device, progress=advance
            )

    @override
    def score(self, head: Head, rows: np.ndarray, progress: Progress) -> dict[str, Any]:
        from featstore.heads import ClassificationHead, score_classification

        if not isinstance(head, ClassificationHead) or head.classes != self.bucket.classes:
            raise IncompatibleError(
                f"a {head.kind!r} head of other classes cannot be scored on {self.bucket.dataset.info.name!r}",
                hint="evaluate on the data set that the head was trained on",
            )
        return score_classification(self.task(rows[:0], rows), head).metrics

    @override
    def baseline(
        self, split: Split, config: BaselineConfig, settings: HeadSettings, progress: Progress, title: str
    ) -> dict[str, Any]:
        from featstore.pipelines.baseline import Images, train_baseline

        recipe = self.bucket.runs[0].recipe
        images = Images(self.bucket.dataset, self.bucket.stored.samples.keys, recipe.height_px, recipe.width_px)
        with StepProgress(progress, title) as advance:
            return train_baseline(
                images, self.task(*split), config, seed=settings.seed, device=settings.device, progress=advance
            )


def read_image_labels(bucket: OpenBucket) -> dict[str, int]:
    """Labels of images by key, where an image has one.

    Raises:
        BadRequestError: for a data set without such labels, of one class only, or with a label outside its classes.
    """
    dataset, info = bucket.dataset, bucket.dataset.info
    found = {sample.key: dataset.image_label(sample.key) for sample in dataset.samples} if info.image_classes else {}
    labels = {key: label for key, label in found.items() if label is not None}
    if not labels:
        raise BadRequestError(
            f"data set {info.name!r} has no labels of whole images",
            hint="sort the images of a folder into train/CLASS/ and test/CLASS/, for any number of classes",
        )
    if len(info.image_classes) < 2:
        raise BadRequestError(
            f"data set {info.name!r} has one class only, {info.image_classes[0]!r}",
            hint="classification tells two classes or more apart",
        )
    for key, label in labels.items():
        if not 0 <= label < len(info.image_classes):
            raise BadRequestError(
                f"the label of {key!r} is {label}, which is outside 0..{len(info.image_classes) - 1}",
                hint=f"data set {info.name!r} has the classes {', '.join(info.image_classes)}",
            )
    return labels


def predict(head: Head, bucket: OpenBucket, rows: np.ndarray, out: Path, progress: Progress) -> dict[str, Any]:
    """Write `TABLE`: key, class and the probability of every class of each row.

    Returns:
        ``classes``, ``file``, and for each of ``images`` its ``key``, ``class`` and ``probabilities`` in the order of
        the classes.
    """
    from featstore.heads import ClassificationHead
    from featstore.heads.stream import Stream

    assert isinstance(head, ClassificationHead)
    features = bucket.features(np.isin(np.arange(len(bucket.stored.samples.keys)), rows))
    said: dict[int, list[float]] = {}
    progress.start("classifying", len(rows), "images")
    try:
        for maps in Stream(features=features, rows=rows, batch=head.config.batch_size).epoch(0):
            said |= zip(maps.rows.tolist(), head.predict_maps(maps).probabilities.tolist(), strict=True)
            progress.advance(len(maps.rows))
    finally:
        progress.stop()
    images = [
        {
            "key": bucket.stored.samples.keys[row],
            "class": head.classes[int(np.argmax(said[row]))],
            "probabilities": said[row],
        }
        for row in rows.tolist()
    ]
    path = out / TABLE
    try:
        out.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream)
            table.writerow(["image", "class", *head.classes])
            table.writerows([image["key"], image["class"], *image["probabilities"]] for image in images)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}", hint="check space and rights") from error
    return {"classes": list(head.classes), "file": str(path), "images": images}

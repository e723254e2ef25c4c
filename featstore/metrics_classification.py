"""Scores of classified images, by torchmetrics where it has them, and the area under the risk-coverage curve.

T images, c classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError

CALIBRATION_BINS = 15
"""Bins of confidence, of equal width, that the calibration error is taken over (Guo et al., ICML 2017)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationScores:
    """What class probabilities of images score against the truth; all values are in 0..1, NaN for no image."""

    accuracy: float
    """Part of the images that are right."""
    mean_class_accuracy: float
    """Mean of ``class_accuracy`` over the classes that have one."""
    auroc: float | None
    """Mean of ``class_auroc`` over the classes that have one; None if none has."""
    average_precision: float | None
    """Mean of ``class_average_precision`` over the classes that have one; None if none has."""
    calibration_error: float
    """Expected calibration error: mean of |confidence - accuracy| over `CALIBRATION_BINS` bins, weighted by images."""
    aurc: float
    """Area under the risk-coverage curve, see `risk_coverage_area`; less is better."""
    classes: tuple[str, ...]
    """Names of the classes, in label order."""
    images: tuple[int, ...]
    """Images of each class in the truth."""
    class_accuracy: tuple[float | None, ...]
    """Part of a class' images that are right; None where the truth has none."""
    class_auroc: tuple[float | None, ...]
    """Area under the ROC curve, this class against the rest; None where the truth has no or only such images."""
    class_average_precision: tuple[float | None, ...]
    """Average precision, this class against the rest; None where the truth has no such image."""

    def to_json(self) -> dict[str, Any]:
        """The means, and ``per_class``, as plain JSON values."""
        columns = (self.classes, self.images, self.class_accuracy, self.class_auroc, self.class_average_precision)
        names = ("class", "images", "accuracy", "auroc", "average_precision")
        per_class = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        means = ("accuracy", "mean_class_accuracy", "auroc", "average_precision", "calibration_error", "aurc")
        values = {name: getattr(self, name) for name in means}
        return {n: None if v is None or math.isnan(v) else v for n, v in values.items()} | {"per_class": per_class}


def classification_scores(
    probabilities: npt.NDArray[np.float32], truth: npt.NDArray[np.int64], classes: Sequence[str]
) -> ClassificationScores:
    """Score predicted probabilities.

    Args:
        probabilities: (T, c) float32 in 0..1, sums to 1 over classes.
        truth: (T,) int64 labels 0..c-1.
        classes: the c names.

    Raises:
        BadRequestError: if shapes or labels do not fit together.
    """
    if len(classes) < 2:
        raise BadRequestError(f"classification needs at least 2 classes, not {len(classes)}")
    if probabilities.shape != (len(truth), len(classes)):
        raise BadRequestError(f"{len(truth)} images of {len(classes)} classes, but probabilities {probabilities.shape}")
    if len(truth) and not 0 <= truth.min() <= truth.max() < len(classes):
        raise BadRequestError(f"labels {truth.min()}..{truth.max()} are not within 0..{len(classes) - 1}")
    images = np.bincount(truth, minlength=len(classes))
    none: list[float | None] = [None] * len(classes)
    accuracy, auroc, precision = none, list(none), list(none)
    calibration = math.nan
    if len(truth):
        # here, because torchmetrics imports transformers and torchvision: 3 s and 260 MiB
        import torch
        from torchmetrics.functional import classification as scores

        said, true = torch.from_numpy(probabilities), torch.from_numpy(truth)
        matrix = scores.multiclass_confusion_matrix(said, true, num_classes=len(classes)).numpy()
        accuracy = [float(matrix[k, k] / n) if n else None for k, n in enumerate(images)]
        for label in np.flatnonzero(images):
            column, own = said[:, label], (true == int(label)).long()
            precision[label] = float(scores.binary_average_precision(column, own))
            if images[label] < len(truth):
                auroc[label] = float(scores.binary_auroc(column, own))
        calibration = float(
            scores.multiclass_calibration_error(said, true, num_classes=len(classes), n_bins=CALIBRATION_BINS)
        )
    predicted = probabilities.argmax(1)
    return ClassificationScores(
        accuracy=float((predicted == truth).mean()) if len(truth) else math.nan,
        mean_class_accuracy=_mean(accuracy, math.nan),
        auroc=_mean(auroc, None),
        average_precision=_mean(precision, None),
        calibration_error=calibration,
        aurc=risk_coverage_area(probabilities.max(1), predicted != truth),
        classes=tuple(classes),
        images=tuple(images.tolist()),
        class_accuracy=tuple(accuracy),
        class_auroc=tuple(auroc),
        class_average_precision=tuple(precision),
    )


def risk_coverage_area(confidence: npt.NDArray[np.float32], wrong: npt.NDArray[np.bool_]) -> float:
    """Area under the risk-coverage curve: the mean, over n = 1..T, of the error rate of the n most confident images.

    Of Geifman, Uziel and El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019
    (torchmetrics has none). It is small where a classifier errs seldom and knows when. Images of equal confidence
    count as if the errors among them were spread evenly, so the order of images does not matter.

    Args:
        confidence: (T,) float32, what the predicted class got.
        wrong: (T,) bool.

    Returns:
        0..1; NaN for no image.
    """
    if not len(confidence):
        return math.nan
    _, level, ties = np.unique(-confidence, return_inverse=True, return_counts=True)
    rate = np.bincount(level, weights=wrong) / ties
    errors = np.cumsum(np.repeat(rate, ties))
    return float((errors / np.arange(1, len(confidence) + 1)).mean())


def _mean(values: Sequence[float | None], empty: Any) -> Any:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else empty

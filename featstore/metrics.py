"""Scores of label maps, by torchmetrics, and the small-area rule of label-scarce segmentation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError

IGNORE_LABEL = 255
"""Label of pixels that neither train nor count."""

_RULE_PIXELS = 20
_RULE_SIDE_PX = 256


def small_area_min_px(height_px: int, width_px: int) -> int:
    """How many pixels a class needs in an image to count: 20 at 256 x 256, scaled with the area, rounded up.

    It is 2 at 64 x 64 and never below 1.
    """
    return max(1, math.ceil(_RULE_PIXELS * height_px * width_px / _RULE_SIDE_PX**2))


def small_area_mask(
    mask: npt.NDArray[np.uint8], min_px: int | None = None, *, ignore_label: int = IGNORE_LABEL
) -> npt.NDArray[np.uint8]:
    """The label map with every class of fewer than ``min_px`` pixels set to ``ignore_label``.

    Args:
        mask: (H, W) uint8 labels of one image.
        min_px: smallest number of pixels that counts; None: `small_area_min_px` of the map's size.
        ignore_label: the label to write, which itself is never counted.

    Returns:
        A new (H, W) uint8 array; ``mask`` is left as it is.

    Raises:
        BadRequestError: if ``mask`` is not a 2-d uint8 array.
    """
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise BadRequestError(f"a label map is (H, W) uint8, not {mask.shape} {mask.dtype}")
    if min_px is None:
        min_px = small_area_min_px(*mask.shape)
    counts = np.bincount(mask.reshape(-1), minlength=256)
    table = np.arange(256, dtype=np.uint8)
    table[counts < min_px] = ignore_label
    table[ignore_label] = ignore_label
    return table[mask]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationScores:
    """What a set of predicted label maps scores against the truth; all values are in 0..1."""

    miou: float
    """Mean of ``iou`` over the classes that have one."""
    accuracy: float
    """Part of the labelled pixels that are right (aAcc)."""
    macc: float
    """Mean over the classes that are in the truth and could be learned: the part of a class's pixels that are right
    (mAcc)."""
    classes: tuple[str, ...]
    """Names of the classes, in label order."""
    iou: tuple[float | None, ...]
    """Intersection over union by class; None where the class is neither in the truth nor predicted, or has no score
    because nobody could have learned it."""
    pixels: tuple[int, ...]
    """Labelled pixels of each class in the truth."""

    def to_json(self) -> dict[str, Any]:
        """``{"miou", "accuracy", "macc", "per_class": [{"class", "iou", "pixels"}]}`` of plain JSON values."""
        rows = zip(self.classes, self.iou, self.pixels, strict=True)
        per_class = [{"class": name, "iou": iou, "pixels": pixels} for name, iou, pixels in rows]
        return {"miou": self.miou, "accuracy": self.accuracy, "macc": self.macc, "per_class": per_class}


class SegmentationMeter:
    """Collects predictions image by image; one confusion matrix over the whole set.

    Intersection over union is taken over all pixels of the set, not per image, as
    ``yandex-research/ddpm-segmentation`` does. Two choices differ from that code and are the usual
    ones: a pixel that the truth ignores does not count anywhere (there, a prediction on it enlarges
    the union), and a class with an empty union is left out of the mean (there, it enters as 0).
    """

    def __init__(
        self, classes: Sequence[str], *, ignore_label: int = IGNORE_LABEL, absent: Collection[str] = ()
    ) -> None:
        """Begin without predictions.

        Args:
            classes: names in label order.
            ignore_label: of pixels that do not count.
            absent: names of classes that are not in the training images: they have no IoU and are left out of mIoU
                and of mean class accuracy. Their pixels stay in the accuracy and in the unions of the other classes.
        """
        if len(classes) < 2:
            raise BadRequestError(f"segmentation needs at least 2 classes, not {len(classes)}")
        # here, because torchmetrics imports transformers and torchvision: 3 s and 260 MiB
        from torchmetrics.classification import MulticlassConfusionMatrix

        self._classes = tuple(classes)
        self._scored = np.array([name not in absent for name in classes])
        self._matrix = MulticlassConfusionMatrix(num_classes=len(classes), ignore_index=ignore_label)
        self._updated = False

    def update(self, predicted: npt.NDArray[np.uint8], truth: npt.NDArray[np.uint8]) -> None:
        """Count label maps of equal shape, uint8; the truth may hold the ignored label."""
        if predicted.shape != truth.shape:
            raise BadRequestError(f"predicted labels {predicted.shape} and true labels {truth.shape} differ in shape")
        import torch

        self._matrix.update(torch.from_numpy(predicted.astype(np.int64)), torch.from_numpy(truth.astype(np.int64)))
        self._updated = True

    @property
    def confusion(self) -> npt.NDArray[np.int64]:
        """Pixels by (true class, predicted class); zeros before the first update."""
        size = len(self._classes)
        if not self._updated:
            return np.zeros((size, size), np.int64)
        matrix: npt.NDArray[np.int64] = self._matrix.compute().numpy().astype(np.int64)
        return matrix

    def compute(self) -> SegmentationScores:
        """The scores of what was counted; mIoU and both accuracies are NaN if no labelled pixel was."""
        matrix = self.confusion
        right = np.diag(matrix)
        union = matrix.sum(0) + matrix.sum(1) - right
        iou = [float(r / u) if u and s else None for r, u, s in zip(right, union, self._scored, strict=True)]
        present = [value for value in iou if value is not None]
        total = int(matrix.sum())
        true = matrix.sum(1)
        counted = (true > 0) & self._scored
        return SegmentationScores(
            miou=float(np.mean(present)) if present else math.nan,
            accuracy=float(right.sum() / total) if total else math.nan,
            macc=float(np.mean(right[counted] / true[counted])) if counted.any() else math.nan,
            classes=self._classes,
            iou=tuple(iou),
            pixels=tuple(int(n) for n in true),
        )

"""A segmentation problem: features, labels and who trains.

N images, h w height and width of labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError
from featstore.heads.features import Features
from featstore.heads.head import PixelSpec
from featstore.heads.labels import LabelMaps
from featstore.heads.reading import Rows
from featstore.metrics import small_area_mask


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationTask:
    """Features and labels of one segmentation problem and one split of it."""

    features: Features
    """The maps."""
    masks: LabelMaps
    """(N, h, w) uint8 labels before the small-area rule; ``ignore_label`` where a pixel has none."""
    train_rows: Rows
    """Rows of the arrays that train."""
    test_rows: Rows
    """Rows that are scored; may be empty."""
    classes: Sequence[str]
    """Names of the classes in label order."""
    ignore_label: int = 255
    """Label of pixels that do not count."""

    def spec(self) -> PixelSpec:
        """The specification of a pixel head for this task.

        Raises:
            BadRequestError: if labels and rows do not fit together.
        """
        _check(self)
        return PixelSpec(
            features=self.features.spec(),
            classes=tuple(self.classes),
            size=(self.masks.shape[1], self.masks.shape[2]),
            ignore_label=self.ignore_label,
        )

    def labels(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """(len(rows), h, w) uint8 labels of rows, after the small-area rule."""
        maps = [small_area_mask(self.masks[row], ignore_label=self.ignore_label) for row in rows]
        return np.stack(maps) if maps else np.empty((0, *self.masks.shape[1:]), np.uint8)


def _check(task: SegmentationTask) -> None:
    """Refuse tasks whose parts do not fit together."""
    if len(task.masks.shape) != 3 or task.masks.dtype != np.uint8:
        raise BadRequestError(f"masks are (N, h, w) uint8, not {task.masks.shape} {task.masks.dtype}")
    images = len(task.masks)
    if task.features.images != images:
        raise BadRequestError(f"the features have {task.features.images} images, the masks have {images}")
    for kind, rows in (("training", task.train_rows), ("test", task.test_rows)):
        outside = [row for row in rows if not 0 <= row < images]
        if outside:
            raise BadRequestError(f"{kind} row {outside[0]} is outside 0..{images - 1}")
        for row in rows:
            mask = task.masks[row]
            bad = mask[(mask != task.ignore_label) & (mask >= len(task.classes))]
            if bad.size:
                raise BadRequestError(
                    f"label {int(bad[0])} in row {row} is outside the classes 0..{len(task.classes) - 1} "
                    f"and not {task.ignore_label}"
                )
    if not len(task.train_rows):
        raise BadRequestError("no training rows")
    both = sorted(set(map(int, task.train_rows)) & set(map(int, task.test_rows)))
    if both:
        raise BadRequestError(f"{len(both)} rows are both trained and tested on, the first is {both[0]}")

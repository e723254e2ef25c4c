"""A problem of classifying whole images: features, one label an image and who trains.

N images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError
from featstore.heads.features import Features
from featstore.heads.reading import Rows

UNLABELLED = -1
"""Label of an image that has none."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationTask:
    """Features and labels of one classification problem and one split of it."""

    features: Features
    """The maps."""
    labels: npt.NDArray[np.int64]
    """(N,) int64 in 0..classes-1; `UNLABELLED` where an image has none."""
    train_rows: Rows
    """Rows of the arrays that train."""
    test_rows: Rows
    """Rows that are scored; may be empty."""
    classes: Sequence[str]
    """Names of the classes in label order."""

    def check(self) -> None:
        """Refuse a task whose parts do not fit together; what only training needs is `check_training`'s.

        Raises:
            BadRequestError: naming the first thing that does not fit.
        """
        if len(self.classes) < 2:
            raise BadRequestError(
                f"there is one class only, {self.classes[0]!r}" if self.classes else "there are no classes",
                hint="classification tells two classes or more apart",
            )
        if self.labels.ndim != 1 or self.labels.dtype.kind != "i":
            raise BadRequestError(f"labels are (N,) integers, not {self.labels.shape} {self.labels.dtype}")
        images = len(self.labels)
        if self.features.images != images:
            raise BadRequestError(f"the features have {self.features.images} images, there are {images} labels")
        for kind, rows in (("training", self.train_rows), ("test", self.test_rows)):
            wanted = np.asarray(rows, np.int64)
            for row in wanted[(wanted < 0) | (wanted >= images)][:1]:
                raise BadRequestError(f"{kind} row {row} is outside 0..{images - 1}")
            labels = self.labels[wanted]
            for row in wanted[(labels < 0) | (labels >= len(self.classes))][:1]:
                what = "has no label" if self.labels[row] == UNLABELLED else f"has label {self.labels[row]}"
                raise BadRequestError(f"{kind} row {row} {what}; labels are 0..{len(self.classes) - 1}")
        both = np.intersect1d(np.asarray(self.train_rows, np.int64), np.asarray(self.test_rows, np.int64))
        if len(both):
            raise BadRequestError(f"{len(both)} rows are both trained and tested on, the first is {both[0]}")

    def check_training(self) -> None:
        """Refuse what cannot be trained on, beside what `check` refuses.

        Raises:
            BadRequestError: without two classes among the training rows.
        """
        self.check()
        if not len(self.train_rows):
            raise BadRequestError("no training rows")
        present = np.unique(self.labels[np.asarray(self.train_rows, np.int64)])
        if len(present) < 2:
            raise BadRequestError(
                f"all {len(self.train_rows)} training images are of one class, {self.classes[present[0]]!r}",
                hint="train on images of two classes or more",
            )

    def absent(self) -> list[str]:
        """Names of the classes that no training row has."""
        present = set(self.labels[np.asarray(self.train_rows, np.int64)].tolist())
        return [name for label, name in enumerate(self.classes) if label not in present]

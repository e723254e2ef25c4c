"""PCK, the share of correct points, of semantic correspondence: by image and by box, per pair and per point.

A point is correct if it is found no farther than alpha times a side of the target from where it is:
the image's larger side (``pck_img``) or the larger side of the object's box (``pck_bbox``), as in Min
et al., "SPair-71k: A Large-scale Benchmark for Semantic Correspondence", 2019 (arXiv 1908.10543).
*Per image* is the mean over pairs of each pair's share, *per point* the share of all points of all
pairs; papers report one or the other and seldom say which (DIFT, Tang et al., NeurIPS 2023, has both).

P points of a pair.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError

ALPHA = 0.1
"""The share of the side that a point may be off by; the value that papers compare at."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorrespondenceScores:
    """What found points score; all values are in 0..1, and NaN where there is no pair."""

    pck_img: float
    """By the image's larger side, mean over pairs."""
    pck_bbox: float
    """By the larger side of the target's box, mean over pairs."""
    pck_img_point: float
    """By the image's larger side, share of all points."""
    pck_bbox_point: float
    """By the larger side of the target's box, share of all points."""
    pck_bbox_auc: float
    """``pck_bbox`` as a function of alpha, its mean over alpha in (0, `ALPHA`]: the area under that curve, as a share.

    It is the mean over pairs of each pair's mean of max(0, 1 - distance / (alpha * side)), exactly.
    """
    pairs: int
    """Pairs that were scored."""
    points: int
    """Points that were scored, of all pairs."""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values; None for NaN."""
        values = dataclasses.asdict(self)
        return {name: None if math.isnan(value) else value for name, value in values.items()}


class CorrespondenceMeter:
    """Collects found points pair by pair. Give it points only that are visible in both images."""

    def __init__(self, *, alpha: float = ALPHA) -> None:
        if not alpha > 0:
            raise BadRequestError(f"alpha {alpha} must be positive")
        self.alpha = alpha
        self._categories: list[str] = []
        self._by_image: list[npt.NDArray[np.float64]] = []
        self._by_box: list[npt.NDArray[np.float64]] = []

    def update(
        self,
        found_xy_px: npt.NDArray[np.floating[Any]],
        true_xy_px: npt.NDArray[np.floating[Any]],
        *,
        size_px: tuple[int, int],
        box_px: tuple[float, float, float, float],
        category: str = "",
    ) -> None:
        """Count one pair.

        Args:
            found_xy_px: (P, 2) where the points were found: x and y in pixels of the target image.
            true_xy_px: (P, 2) where they are.
            size_px: height and width of the target image.
            box_px: x0, y0, x1, y1 of the object in the target image.
            category: what the object is.

        Raises:
            BadRequestError: for arrays of other shapes, no points, or a box or an image without extent.
        """
        if found_xy_px.shape != true_xy_px.shape or true_xy_px.shape[1:] != (2,) or not len(true_xy_px):
            raise BadRequestError(
                f"found and true points are (P, 2) with P of 1 or more, not {found_xy_px.shape} and {true_xy_px.shape}"
            )
        image_side, box_side = max(size_px), max(box_px[2] - box_px[0], box_px[3] - box_px[1])
        if not (image_side > 0 and box_side > 0):
            raise BadRequestError(f"an image of {size_px} px with a box {box_px} has no side to measure by")
        off = np.asarray(found_xy_px, np.float64) - np.asarray(true_xy_px, np.float64)
        distance = np.hypot(off[:, 0], off[:, 1])
        self._categories.append(category)
        self._by_image.append(distance / image_side)
        self._by_box.append(distance / box_side)

    def compute(self) -> CorrespondenceScores:
        """The scores of all pairs that were counted."""
        return self._of(np.arange(len(self._categories)))

    def by_category(self) -> dict[str, CorrespondenceScores]:
        """The scores of each category's pairs, in alphabetical order."""
        categories = np.array(self._categories)
        return {str(name): self._of(np.flatnonzero(categories == name)) for name in np.unique(categories)}

    def _of(self, pairs: npt.NDArray[np.int64]) -> CorrespondenceScores:
        if not len(pairs):
            nan = math.nan
            return CorrespondenceScores(
                pck_img=nan, pck_bbox=nan, pck_img_point=nan, pck_bbox_point=nan, pck_bbox_auc=nan, pairs=0, points=0
            )
        counts = np.array([len(self._by_box[pair]) for pair in pairs])
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        by_image = np.concatenate([self._by_image[pair] for pair in pairs])
        by_box = np.concatenate([self._by_box[pair] for pair in pairs])

        def per_pair(values: npt.NDArray[Any]) -> float:
            return float((np.add.reduceat(values.astype(np.float64), starts) / counts).mean())

        return CorrespondenceScores(
            pck_img=per_pair(by_image <= self.alpha),
            pck_bbox=per_pair(by_box <= self.alpha),
            pck_img_point=float((by_image <= self.alpha).mean()),
            pck_bbox_point=float((by_box <= self.alpha).mean()),
            pck_bbox_auc=per_pair(np.clip(1 - by_box / self.alpha, 0, None)),
            pairs=len(pairs),
            points=len(by_box),
        )

"""A correspondence problem: features, named points of images, and the pairs that train and test.

N images, P points of an image, n pairs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError
from featstore.heads.features import Features

_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImagePoints:
    """The named points of one image.

    Raises:
        BadRequestError: if the fields do not fit together, or a visible point lies outside the image.
    """

    names: tuple[str, ...]
    """P names; equal names of two images of one category mean the same point."""
    xy: npt.NDArray[np.float32]
    """(P, 2) float32: x and y as shares of width and height, 0..1."""
    visible: npt.NDArray[np.bool_]
    """(P,) bool: False for points whose ``xy`` means nothing."""
    size_px: tuple[int, int]
    """Height and width of the image that distances are measured in."""
    box_px: tuple[float, float, float, float]
    """x0, y0, x1, y1 of the object in that image."""
    category: str
    """What the object is; only images of one category are paired."""

    def __post_init__(self) -> None:
        """Check sizes and places."""
        count = len(self.names)
        if self.xy.shape != (count, 2) or self.visible.shape != (count,):
            raise BadRequestError(
                f"{count} names need points ({count}, 2) and flags ({count},), not {self.xy.shape} and "
                f"{self.visible.shape}"
            )
        seen = self.xy[self.visible]
        if not ((seen >= 0) & (seen <= 1)).all():
            raise BadRequestError(
                f"visible points lie in 0..1 of the image, not at {seen[~((seen >= 0) & (seen <= 1))]}"
            )

    @property
    def xy_px(self) -> npt.NDArray[np.float32]:
        """(P, 2) float32: x and y in pixels."""
        return self.xy * np.array(self.size_px[::-1], np.float32)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorrespondenceTask:
    """Features, points and pairs of one correspondence problem and one split of it.

    Raises:
        BadRequestError: if features, points and pairs do not fit together.
    """

    features: Features
    """The maps."""
    points: Mapping[int, ImagePoints]
    """Row of the arrays to its points, for every row of a pair."""
    train_pairs: npt.NDArray[np.int64]
    """(n, 2) rows of source and target."""
    test_pairs: npt.NDArray[np.int64]
    """(n, 2) rows that are scored; may be empty."""

    def __post_init__(self) -> None:
        """Check rows and pairs."""
        for kind, pairs in (("training", self.train_pairs), ("test", self.test_pairs)):
            if pairs.ndim != 2 or pairs.shape[1] != 2:
                raise BadRequestError(f"{kind} pairs are (n, 2) rows, not {pairs.shape}")
            for row in np.unique(pairs).tolist():
                if not 0 <= row < self.features.images:
                    raise BadRequestError(f"{kind} row {row} is outside 0..{self.features.images - 1}")
                if row not in self.points:
                    raise BadRequestError(f"row {row} of a {kind} pair has no points")
            for a, b in pairs.tolist():
                if a == b:
                    raise BadRequestError(f"row {a} is paired with itself")
                if self.points[a].category != self.points[b].category:
                    raise BadRequestError(
                        f"rows {a} and {b} of a {kind} pair are {self.points[a].category!r} and "
                        f"{self.points[b].category!r}; pairs are of one category"
                    )
                if not len(shared(self.points[a], self.points[b])[0]):
                    raise BadRequestError(f"rows {a} and {b} of a {kind} pair have no visible point in common")


def shared(
    source: ImagePoints, target: ImagePoints, *, mirrored: bool = False
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The points that are visible in both images.

    Args:
        source: points of one image.
        target: points of another one.
        mirrored: whether the target is mirrored, so that its points named "left .." are those on the right.

    Returns:
        Their numbers in the source and in the target, both (p,) int64, in the source's order.
    """
    names = [mirrored_name(name) for name in target.names] if mirrored else target.names
    there = {name: number for number, name in enumerate(names) if target.visible[number]}
    both = [
        (number, there[name]) for number, name in enumerate(source.names) if source.visible[number] and name in there
    ]
    numbers = np.array(both, np.int64).reshape(-1, 2)
    return numbers[:, 0], numbers[:, 1]


def mirrored_name(name: str) -> str:
    """The name of a point in the mirror: its words left and right, or l and r, change places.

    Other names stay. Points that are numbered and not named, as in SPair-71k, cannot tell sides: do not
    mirror them.
    """
    return re.sub(r"(?<![a-z])(left|right|l|r)(?![a-z])", lambda match: _SIDES[match[0]], name)

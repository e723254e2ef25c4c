"""How far features have drifted from those of the image itself: the GATE guideline's quantitative score.

From section 4.3 of Meng et al., "Suppress Content Shift: Better Diffusion Features via Off-the-Shelf Generation
Techniques" (NeurIPS 2024, arXiv 2410.06719). The reference is the feature of the same layer at t = 0.

B images, C channels, H W map height and width, both 3 or more. Everything is float64 of shape (B, ..).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError

Float64Array = npt.NDArray[np.float64]

LEAST_SIDE = 3
"""Side of the smallest map that has a Laplacian."""
_TELLING_SIDE = 8
"""Side from which maps are judged by default: one of 4 x 4 has four positions, which say nothing of a pattern."""


def telling_layers(shapes: Mapping[str, tuple[int, int, int]]) -> list[str]:
    """Layers whose maps are large enough to be judged: of 8 a side and more, or the largest where none is.

    Args:
        shapes: (C, H, W) by layer.
    """
    sides = {name: min(height, width) for name, (_, height, width) in shapes.items()}
    least = min(_TELLING_SIDE, max(sides.values(), default=0))
    return [name for name, side in sides.items() if side >= max(least, LEAST_SIDE)]


def laplacian_norm(maps: npt.NDArray[Any]) -> Float64Array:
    """Length over channels of the Laplacian of maps: where they change, whatever the channel.

    Args:
        maps: (B, C, H, W), finite.

    Returns:
        (B, H - 2, W - 2) of the 4-neighbour Laplacian; the border, where neighbours are missing, is left out.

    Raises:
        BadRequestError: for maps without four axes, smaller than 3 x 3, or with NaN or infinity.
    """
    if maps.ndim != 4 or min(maps.shape[2:]) < 3:
        raise BadRequestError(f"a Laplacian needs maps (B, C, H, W) of 3 x 3 or more, not {maps.shape}")
    if not np.isfinite(maps).all():
        raise BadRequestError("maps have NaN or infinity", hint="featstore verify finds where")
    squares = np.zeros((maps.shape[0], maps.shape[2] - 2, maps.shape[3] - 2))
    for channel in range(maps.shape[1]):  # one at a time: a float64 copy of all would be four times the maps
        one = maps[:, channel].astype(np.float64)
        inner = one[:, 1:-1, 1:-1]
        squares += (one[:, :-2, 1:-1] + one[:, 2:, 1:-1] + one[:, 1:-1, :-2] + one[:, 1:-1, 2:] - 4 * inner) ** 2
    return np.sqrt(squares)


def shift_map(reference: npt.NDArray[Any], maps: npt.NDArray[Any], *, pattern: bool = False) -> Float64Array:
    """Where features differ from the reference, 0 or more.

    Args:
        reference: (B, C, H, W) at t = 0.
        maps: (B, C, H, W) of the same layer and images.
        pattern: divide the Laplacian's norms by their mean over positions, image by image and on both sides.

    Returns:
        (B, H - 2, W - 2).
    """
    if reference.shape != maps.shape:
        raise BadRequestError(f"features {maps.shape} have another shape than their reference {reference.shape}")
    one, other = laplacian_norm(reference), laplacian_norm(maps)
    return np.abs(_pattern(one) - _pattern(other)) if pattern else np.abs(one - other)


def shift(reference: npt.NDArray[Any], maps: npt.NDArray[Any], *, pattern: bool = False) -> Float64Array:
    """Sum of `shift_map` over positions, (B,): the paper's ``diff``, or that of patterns."""
    total: Float64Array = shift_map(reference, maps, pattern=pattern).sum((1, 2))
    return total


def _pattern(norms: Float64Array) -> Float64Array:
    """Norms (B, H, W) in units of their mean; a map that changes nowhere stays zero."""
    means = norms.mean((1, 2), keepdims=True)
    return norms / np.where(means > 0, means, 1.0)


def score(diff: npt.NDArray[Any], anchor: npt.NDArray[Any]) -> Float64Array:
    """``(anchor - diff) / anchor``: 1 for features like the reference, 0 for the anchor's shift, below 0 for more.

    Args:
        diff: (B,) shifts of the features that are judged.
        anchor: (B,) shifts of a feature with stronger shift, of the same images.

    Raises:
        BadRequestError: for an anchor that has no shift.
    """
    if diff.shape != anchor.shape:
        raise BadRequestError(f"shifts of {diff.shape} features stand beside anchors of {anchor.shape}")
    if not (anchor > 0).all():
        raise BadRequestError(
            f"the anchor has no content shift in {int((anchor <= 0).sum())} of {anchor.size} images",
            hint="take an anchor at a larger timestep than 0, such as 501",
        )
    scores: Float64Array = (anchor - diff) / anchor
    return scores

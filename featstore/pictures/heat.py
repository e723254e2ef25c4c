"""One value a position as colours: dark for low, bright for high, on a scale that several pictures share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError
from featstore.pictures.pca import FloatArray, resize_maps

UInt8Array = npt.NDArray[np.uint8]


def heat_picture(
    values: FloatArray, *, low: float, high: float, size: tuple[int, int] | None = None, image: UInt8Array | None = None
) -> UInt8Array:
    """A map (h, w) as a picture uint8 (H, W, 3).

    Args:
        values: finite.
        low: shown as the darkest.
        high: shown as the brightest.
        size: (H, W) of the picture, reached by bilinear interpolation; None: (h, w).
        image: uint8 (H, W, 3) that shows through in grey; None: heat alone.

    Raises:
        BadRequestError: for another rank, values that are not finite, or an image of another size.
    """
    from matplotlib import colormaps

    if values.ndim != 2 or not np.isfinite(values).all():
        raise BadRequestError(f"heat takes finite values (h, w), not {values.shape}")
    height, width = size or (values.shape[0], values.shape[1])
    share = (resize_maps(values, height, width).astype(np.float64) - low) / ((high - low) or 1.0)
    heat = colormaps["inferno"](np.clip(share, 0, 1))[:, :, :3]
    if image is None:
        alone: UInt8Array = np.rint(heat * 255).astype(np.uint8)
        return alone
    if image.shape != (height, width, 3):
        raise BadRequestError(f"an image {image.shape} cannot show through heat of {height} x {width} px")
    grey = image.astype(np.float64) @ (0.299, 0.587, 0.114)
    mixed: UInt8Array = np.rint(0.35 * grey[:, :, None] + 0.65 * heat * 255).clip(0, 255).astype(np.uint8)
    return mixed

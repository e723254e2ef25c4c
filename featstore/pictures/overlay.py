"""Labels drawn over an image."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from featstore.errors import BadRequestError
from featstore.pictures.palette import colour_labels

UInt8Array = npt.NDArray[np.uint8]


def label_overlay(image: UInt8Array, labels: UInt8Array, *, strength: float = 0.5) -> UInt8Array:
    """The image with the colours of its labels laid over it.

    Args:
        image: uint8 (H, W, 3), RGB.
        labels: uint8 (h, w) of the same view, at any size; each pixel takes the nearest label.
        strength: 0 shows the image alone, 1 the colours alone.

    Returns:
        uint8 (H, W, 3).
    """
    if not 0 <= strength <= 1:
        raise BadRequestError(f"strength {strength} is outside 0..1")
    if image.ndim != 3 or image.dtype != np.uint8:
        raise BadRequestError(f"an image is uint8 (H, W, 3), not {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    resized = np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST), dtype=np.uint8)
    mixed = (1 - strength) * image.astype(np.float32) + strength * colour_labels(resized).astype(np.float32)
    return np.rint(mixed).astype(np.uint8)

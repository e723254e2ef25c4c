"""How close pictures are to others, image by image.

B images, H W height and width in pixels. Pictures are uint8 (B, H, W, 3), RGB; results float64 (B,).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError

UInt8Array = npt.NDArray[np.uint8]
Float64Array = npt.NDArray[np.float64]

CANNY_THRESHOLDS = (100, 200)
"""Lower and upper threshold of `cv2.Canny`: those of the ControlNets' edges."""
MAX_PSNR_DB = 58.92
"""What differs by nothing but the rounding to 8 bits: equal pictures get it in place of infinity."""
_SSIM_SIDE_PX = 11


def ssim(reference: UInt8Array, pictures: UInt8Array) -> Float64Array:
    """Structural similarity (Wang et al., 2004), 1 for equal pictures; torchmetrics' with its Gaussian window.

    Pictures are continued by reflection, so that their borders count.

    Raises:
        BadRequestError: if shapes or types differ, or sides are below 11 px, the width of the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check(reference, pictures)
    if min(reference.shape[1:3]) < _SSIM_SIDE_PX:
        raise BadRequestError(f"SSIM needs sides of {_SSIM_SIDE_PX} px or more, not {reference.shape[1:3]}")
    a, b = _unit(reference), _unit(pictures)
    values = structural_similarity_index_measure(b, a, data_range=1.0, reduction="none")
    return _float64(values.reshape(len(reference)))


def psnr_db(reference: UInt8Array, pictures: UInt8Array) -> Float64Array:
    """Peak signal-to-noise ratio in decibels, at most `MAX_PSNR_DB`; torchmetrics'.

    Raises:
        BadRequestError: if shapes or types differ.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    _check(reference, pictures)
    values = peak_signal_noise_ratio(_unit(pictures), _unit(reference), data_range=1.0, dim=(1, 2, 3), reduction="none")
    return np.minimum(_float64(values), MAX_PSNR_DB)


def edge_f1(reference: UInt8Array, pictures: UInt8Array) -> Float64Array:
    """F1 of the pictures' Canny edges against the reference's, 0..1, where one pixel beside counts as met.

    Two pictures without edges agree (1); one with and one without do not (0).

    Raises:
        BadRequestError: if shapes or types differ.
    """
    import cv2

    _check(reference, pictures)
    square = np.ones((3, 3), np.uint8)
    scores = []
    for one, other in zip(reference, pictures, strict=True):
        wanted, found = (cv2.Canny(np.ascontiguousarray(image), *CANNY_THRESHOLDS) > 0 for image in (one, other))
        near_wanted, near_found = (cv2.dilate(edges.astype(np.uint8), square) > 0 for edges in (wanted, found))
        if not wanted.any() or not found.any():
            scores.append(float(wanted.any() == found.any()))
            continue
        precision, recall = (found & near_wanted).sum() / found.sum(), (wanted & near_found).sum() / wanted.sum()
        scores.append(2 * precision * recall / max(precision + recall, np.finfo(float).tiny))
    return np.array(scores, dtype=np.float64)


def relative_distance(reference: npt.NDArray[Any], values: npt.NDArray[Any]) -> Float64Array:
    """Euclidean distance of each of B arrays from its reference, as a share of the reference's length; 0: equal.

    Args:
        reference: (B, ..), e.g. latents; none is all zero.
        values: of the same shape.

    Raises:
        BadRequestError: if shapes differ, or a reference is zero.
    """
    if reference.shape != values.shape:
        raise BadRequestError(f"arrays {values.shape} have another shape than their reference {reference.shape}")
    flat = reference.reshape(len(reference), -1).astype(np.float64)
    lengths = np.linalg.norm(flat, axis=1)
    if not (lengths > 0).all():
        raise BadRequestError("a reference of length zero has no relative distance")
    differences = values.reshape(len(values), -1).astype(np.float64) - flat
    return _float64(np.linalg.norm(differences, axis=1) / lengths)


def _check(reference: UInt8Array, pictures: UInt8Array) -> None:
    for name, value in (("reference", reference), ("pictures", pictures)):
        if value.dtype != np.uint8 or value.ndim != 4 or value.shape[3] != 3:
            raise BadRequestError(f"{name} are uint8 (B, H, W, 3), got {value.dtype} {value.shape}")
    if reference.shape != pictures.shape:
        raise BadRequestError(f"pictures {pictures.shape} have another shape than their reference {reference.shape}")


def _unit(pictures: UInt8Array) -> Any:
    """Pixels as torch float32 (B, 3, H, W) in [0, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


def _float64(values: Any) -> Float64Array:
    return np.asarray(values, dtype=np.float64)

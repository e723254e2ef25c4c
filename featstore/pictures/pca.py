"""Feature maps as pictures: their first three principal components as red, green and blue.

One basis is fitted over all images and techniques that are shown together, so that equal colours mean
equal features from picture to picture.

N images, C channels, H W map height and width, P pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError

FloatArray = npt.NDArray[np.floating]
UInt8Array = npt.NDArray[np.uint8]

FIT_PIXELS = 20_000
"""How many pixel vectors the basis is fitted on at most."""
CLIPPED_PERCENT = 1.0
"""Share of the pixels at either end of a direction that are shown as its end."""
_EXACT_CHANNELS = 1000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PcaBasis:
    """Three directions in feature space, and which range along each is shown."""

    mean: FloatArray
    """(C,) float64: what is subtracted first."""
    components: FloatArray
    """(3, C) float64: the directions; rows of zeros where there are fewer than three."""
    low: FloatArray
    """(3,) float64: coordinate that is shown as 0."""
    high: FloatArray
    """(3,) float64: coordinate that is shown as 255."""
    explained: tuple[float, ...]
    """Share of the variance along each direction, 0..1."""


def _interpolation(size: int, out: int) -> FloatArray:
    """(out, size) float32: the matrix of linear interpolation from ``size`` to ``out`` cells, ends clamped."""
    position = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    lower = np.floor(position).astype(int)
    upper = np.minimum(lower + 1, size - 1)
    matrix = np.zeros((out, size), dtype=np.float32)
    np.add.at(matrix, (np.arange(out), lower), 1 - (position - lower))
    np.add.at(matrix, (np.arange(out), upper), position - lower)
    return matrix


def resize_maps(maps: FloatArray, height: int, width: int) -> FloatArray:
    """Maps (.., H, W) on another grid, bilinear: float32 (.., height, width)."""
    rows, columns = _interpolation(maps.shape[-2], height), _interpolation(maps.shape[-1], width)
    resized: FloatArray = rows @ maps.astype(np.float32) @ columns.T
    return resized


def layer_size(maps: FloatArray) -> float:
    """Root mean square over pixels of the length of maps (N, C, H, W); 1 where they are all zero."""
    wide = maps.astype(np.float32)
    return float(np.sqrt(np.mean(np.square(wide, dtype=np.float64)) * maps.shape[1])) or 1.0


def stack_layers(layers: Mapping[str, FloatArray], sizes: Mapping[str, float] | None = None) -> FloatArray:
    """Several layers of the same images as one stack of maps, on the grid of the largest.

    Every layer is divided by the root mean square of its values and by the root of its number of channels,
    so that none outweighs the others by its scale or its size.

    Args:
        layers: name to maps (N, C, H, W), the same N.
        sizes: what each layer is divided by, the same for all stacks that are to be compared; None: its own
            `layer_size`.

    Returns:
        float32 (N, sum of C, max H, max W).

    Raises:
        BadRequestError: if there is none, or they are not of the same images.
    """
    if not layers or len({maps.shape[0] for maps in layers.values()}) != 1:
        raise BadRequestError(f"layers of the same images are needed, not {_shapes(layers)}")
    height = max(maps.shape[2] for maps in layers.values())
    width = max(maps.shape[3] for maps in layers.values())
    scaled = []
    for name, maps in layers.items():
        size = layer_size(maps) if sizes is None else sizes[name]
        wide = maps.astype(np.float32)
        scaled.append(resize_maps(wide, height, width) / size)
    return np.concatenate(scaled, axis=1)


def _shapes(layers: Mapping[str, FloatArray]) -> str:
    return ", ".join(f"{name} {maps.shape}" for name, maps in layers.items()) or "none"


def fit_pca(stacks: Sequence[FloatArray], *, seed: int = 0) -> PcaBasis:
    """The common basis of several stacks of maps, e.g. one a technique.

    Args:
        stacks: arrays (N, C, H, W) with the same C; N, H, W may differ.
        seed: of the choice of pixels where there are more than `FIT_PIXELS`, and of the solver.

    Raises:
        BadRequestError: if there is nothing to fit, the channels differ or values are not finite.
    """
    from sklearn.decomposition import PCA

    channels = {maps.shape[1] for maps in stacks if maps.ndim == 4}
    if len(channels) != 1 or any(maps.ndim != 4 or not maps.size for maps in stacks):
        shapes = ", ".join(str(maps.shape) for maps in stacks) or "none"
        raise BadRequestError(f"maps (N, C, H, W) of equal C are needed, not {shapes}")
    rng = np.random.default_rng(seed)
    share = -(-FIT_PIXELS // len(stacks))
    pixels = np.concatenate([some_pixels(maps, share, rng) for maps in stacks])
    if not np.isfinite(pixels).all():
        raise BadRequestError("maps hold values that are not finite", hint="show images that were extracted")
    count = min(3, *pixels.shape)
    # exact and quick while the covariance (C, C) is small; both are functions of the seed alone
    solver = "covariance_eigh" if pixels.shape[1] <= _EXACT_CHANNELS else "randomized"
    pca = PCA(n_components=count, svd_solver=solver, random_state=seed)
    varies = bool(np.ptp(pixels, axis=0).any())
    coordinates = pca.fit_transform(pixels) if varies else np.zeros((len(pixels), count))
    components = np.zeros((3, pixels.shape[1]))
    low, high = np.zeros(3), np.ones(3)
    if varies:
        components[:count] = pca.components_
        low[:count] = np.percentile(coordinates, CLIPPED_PERCENT, axis=0)
        high[:count] = np.percentile(coordinates, 100 - CLIPPED_PERCENT, axis=0)
    explained = tuple(float(value) for value in pca.explained_variance_ratio_) if varies else ()
    return PcaBasis(mean=pixels.mean(axis=0), components=components, low=low, high=high, explained=explained)


def some_pixels(maps: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
    """At most ``count`` pixel vectors of maps (N, C, H, W), drawn without repetition: float64 (P, C)."""
    images, _, height, width = maps.shape
    total = images * height * width
    chosen = np.arange(total) if total <= count else np.sort(rng.choice(total, count, replace=False))
    image, row, column = np.unravel_index(chosen, (images, height, width))
    pixels: FloatArray = maps[image, :, row, column].astype(np.float64)
    return pixels


def pca_pictures(basis: PcaBasis, maps: FloatArray) -> UInt8Array:
    """Maps (N, C, H, W) as pictures: uint8 (N, H, W, 3)."""
    if maps.ndim != 4 or maps.shape[1] != len(basis.mean):
        raise BadRequestError(f"maps are {maps.shape}; the basis takes (N, {len(basis.mean)}, H, W)")
    span = np.where(basis.high > basis.low, basis.high - basis.low, 1.0)
    images, _, height, width = maps.shape
    pictures = np.empty((images, height, width, 3), dtype=np.uint8)
    for index in range(images):  # one by one, so that only one is held in float64
        vectors = maps[index].astype(np.float64).reshape(len(basis.mean), -1)
        coordinates = basis.components @ (vectors - basis.mean[:, None])
        share = np.clip((coordinates.T - basis.low) / span, 0, 1)
        pictures[index] = np.rint(np.nan_to_num(share) * 255).reshape(height, width, 3)
    return pictures

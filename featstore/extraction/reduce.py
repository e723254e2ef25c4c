"""``--reduce pca:N``: a layer's channels projected onto its first principal components, on the device.

Shapes: B rows of a batch, C channels, N components, H W map height and width, P pixel vectors.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

from featstore.store.basis import Basis


class Projection:
    """A basis on a device; calling it reduces maps.

    Args:
        basis: of one layer.
        device: where the maps are.
    """

    def __init__(self, basis: Basis, device: torch.device) -> None:
        self._mean = torch.from_numpy(basis.mean).to(device)[:, None]
        self._components = torch.from_numpy(basis.components).to(device)

    def __call__(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in any floating type to float32 (B, N, H, W).

        Row by row, each a product of one shape in memory of its own: libraries choose how to add by shape and
        alignment, and a row's bytes must not depend on how many stand beside it.
        """
        rows = [self._components @ (row.flatten(1).float() - self._mean).contiguous() for row in maps]
        return torch.stack(rows).reshape(len(maps), -1, *maps.shape[2:])


class Moments:
    """Mean and covariance of pixel vectors, gathered map by map in float64.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._shift: npt.NDArray[np.float64] | None = None
        self._sum = np.zeros(channels)
        self._products = np.zeros((channels, channels))

    def add(self, vectors: npt.NDArray[np.floating]) -> None:
        """Take P more vectors, (P, C)."""
        wide = vectors.astype(np.float64)
        # Moments about a point amid the data: those about zero would cancel where means are far from it.
        if self._shift is None:
            self._shift = wide.mean(axis=0)
        wide -= self._shift
        self._count += len(wide)
        self._sum += wide.sum(axis=0)
        self._products += wide.T @ wide

    def basis(self, components: int) -> Basis:
        """The mean and the first principal components of what was added.

        Of each component the largest entry (the first of them) is positive, so that the same vectors give the same
        signs.

        Args:
            components: N, below C.
        """
        if self._shift is None:
            raise ValueError("no vectors were added")
        mean = self._sum / self._count
        covariance = self._products / self._count - np.outer(mean, mean)
        variances, vectors = np.linalg.eigh(covariance)
        first = vectors.T[::-1][:components]
        signs = np.sign(first[np.arange(components), np.abs(first).argmax(axis=1)])
        total = float(np.trace(covariance))
        explained = float(variances[::-1][:components].sum()) / total if total > 0.0 else 1.0
        return Basis(
            mean=(self._shift + mean).astype(np.float32),
            components=np.ascontiguousarray(first * signs[:, None], dtype=np.float32),
            explained=min(1.0, max(0.0, explained)),
        )


def some_pixels(
    maps: npt.NDArray[np.floating], digest: str, layer: str, seed: int, count: int
) -> npt.NDArray[np.floating]:
    """Vectors at ``count`` places of a map, chosen by seed, image and layer alone; all of them if it has no more.

    Args:
        maps: (C, H, W) of one image.
        digest: SHA-256 of the image.
        layer: name of the layer.
        seed: of the run.
        count: how many.

    Returns:
        (min(count, H W), C).
    """
    pixels = maps.reshape(len(maps), -1)
    if pixels.shape[1] > count:
        words = f"featstore reduce|{seed}|{digest}|{layer}"
        key = int.from_bytes(hashlib.sha256(words.encode()).digest()[:16], "big")
        places = np.random.Generator(np.random.Philox(key=key)).choice(pixels.shape[1], count, replace=False)
        pixels = pixels[:, np.sort(places)]
    return pixels.T

"""Vectors at points of maps, and their nearest neighbours on a grid; no map is ever brought to the grid's size.

Interpolation is linear, so the product of a vector with an interpolated map is the interpolated product:
one score a point and position of the native map, not one vector a position of the grid. The norms that a
cosine needs are exact as well: the square of a mix of four vectors is a mix of their ten products, which
are taken once, at the map's own size. Equal to ``F.interpolate`` of everything and a search in that.

Places are shares of width and height: x and y in 0..1, (0.5, 0.5) is the image's middle, and the centre
of the first of W columns is 0.5 / W.

P points, C channels of a layer, D channels of all layers, H W a layer's height and width, h w the grid's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from featstore.heads.gather import Neighbours

_CHUNK_BYTES = 64 * 1024**2
_TINY = 1e-8


def at_points(layers: Mapping[str, Tensor], xy: Tensor) -> Tensor:
    """Vectors at places of one image, bilinear between positions, the layers side by side.

    Equals bilinear upsampling (``align_corners=False``) at the upsampled map's positions; gradients flow
    into the maps.

    Args:
        layers: layer name to (C, H, W) float32.
        xy: (P, 2) float32, x and y in 0..1.

    Returns:
        (P, D) float32.
    """
    places = (2 * xy - 1).view(1, 1, -1, 2)
    found = [
        functional.grid_sample(layer.unsqueeze(0), places, padding_mode="border", align_corners=False)[0, :, 0]
        for layer in layers.values()
    ]
    return torch.cat(found).T


class Grid:
    """The positions of one image that are searched, with what a search needs of each."""

    def __init__(self, layers: Mapping[str, Tensor], size: tuple[int, int]) -> None:
        """Take the norms of all vectors.

        Args:
            layers: layer name to (C, H, W) float32.
            size: (h, w).
        """
        self.layers = dict(layers)
        self.size = size
        self._squares = torch.stack([_squares(layer, size) for layer in self.layers.values()]).sum(0)

    def cosines(self, vectors: Tensor) -> Tensor:
        """Cosines between vectors and those of all positions; gradients flow into both.

        Args:
            vectors: (P, D) float32.

        Returns:
            (P, h, w) float32 in -1..1; 0 for a vector of zeros.
        """
        pieces = torch.split(vectors, [layer.shape[0] for layer in self.layers.values()], 1)
        scores = vectors.new_zeros(len(vectors), *self.size)
        for piece, layer in zip(pieces, self.layers.values(), strict=True):
            native = (piece @ layer.flatten(1)).view(len(vectors), 1, *layer.shape[1:])
            scores = scores + functional.interpolate(native, self.size, mode="bilinear", align_corners=False)[:, 0]
        norms = self._squares.clamp_min(_TINY**2).sqrt() * vectors.norm(dim=1).clamp_min(_TINY)[:, None, None]
        cosines: Tensor = scores / norms
        return cosines

    def nearest(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The position with the highest cosine for each vector; some vectors at a time, so that memory stays small.

        Args:
            vectors: (P, D) float32.

        Returns:
            Centres of the positions (P, 2) float32, x and y in 0..1, and their cosines (P,) float32.
        """
        height, width = self.size
        chunk = max(1, _CHUNK_BYTES // (4 * height * width))
        best = [self.cosines(some).flatten(1).max(1) for some in torch.split(vectors, chunk)]
        place = torch.cat([one.indices for one in best])
        x, y = place % width, torch.div(place, width, rounding_mode="floor")
        xy = torch.stack([(x + 0.5) / width, (y + 0.5) / height], 1)
        return xy.float(), torch.cat([one.values for one in best])

    def positions(self, xy: Tensor) -> Tensor:
        """The position that each place lies in.

        Args:
            xy: (P, 2) float32, x and y in 0..1.

        Returns:
            (P,) int64, y * w + x.
        """
        height, width = self.size
        sides = xy.new_tensor([width, height])
        cell = torch.minimum((xy * sides).floor(), sides - 1).clamp_min(0).long()
        return cell[:, 1] * width + cell[:, 0]


def _squares(layer: Tensor, size: tuple[int, int]) -> Tensor:
    """Squared norms (h, w) of the interpolated vectors of a layer (C, H, W)."""
    near = _neighbours(tuple(layer.shape[1:]), size, layer.device)
    # beyond the last row and column, interpolation repeats them
    padded = functional.pad(layer.unsqueeze(0), (0, 1, 0, 1), mode="replicate")[0]
    corners = (padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:])
    first = near.index[:, 0]
    total = layer.new_zeros(len(first))
    for a, b in itertools.combinations_with_replacement(range(4), 2):
        products = (corners[a] * corners[b]).sum(0).reshape(-1)
        total = total + (1 if a == b else 2) * near.weight[:, a] * near.weight[:, b] * products[first]
    return total.view(size)


@functools.lru_cache(maxsize=16)
def _neighbours(map_size: tuple[int, int], size: tuple[int, int], device: torch.device) -> Neighbours:
    return Neighbours.between(map_size, size, device)

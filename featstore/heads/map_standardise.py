"""Whole maps brought to one scale, channel by channel.

B images, K runs in the bucket, C channels of a layer, H W its height and width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from featstore.errors import BadRequestError
from featstore.heads.features import FeaturesSpec, Shapes
from featstore.heads.standardise import Standardise
from featstore.heads.stream import Maps


class MapStandardise(nn.Module):
    """Zero mean and unit deviation for every channel of every layer of every run, and of what stands beside.

    Statistics are over images and positions of the maps that `fit` is given. A channel that is constant
    there becomes 0 everywhere. Until it is fitted, maps pass through as they are.
    """

    def __init__(self, spec: FeaturesSpec) -> None:
        super().__init__()
        self.layers = dict(spec.layers)
        self.beside = dict(spec.beside_layers)
        self.scale = Standardise(len(spec.runs), spec.channels, spec.beside_channels)

    @torch.no_grad()
    def fit(self, batches: Iterable[Maps]) -> None:
        """Take the statistics of all maps in ``batches``, which are gone through once.

        Args:
            batches: an epoch of a `featstore.heads.stream.Stream`, or a list of `Maps`.

        Raises:
            BadRequestError: if there are none.
        """
        layers = {name: _Moments() for name in self.layers}
        beside = {name: _Moments() for name in self.beside}
        for maps in batches:
            for name, moments in layers.items():
                moments.update(maps.layers[name])
            for name, moments in beside.items():
                moments.update(maps.beside[name])
        if not all(moments.images for moments in (*layers.values(), *beside.values())):
            raise BadRequestError("no maps to take means and deviations from", hint="give at least one training image")
        empty = torch.empty(0)
        self.scale.fit(
            (_joined(layers, "mean", 1), _joined(layers, "deviation", 1)),
            (_joined(beside, "mean", 0) if beside else empty, _joined(beside, "deviation", 0) if beside else empty),
        )

    def forward(self, maps: Maps) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Standardise.

        Args:
            maps: maps on any device, float16 or float32.

        Returns:
            Layer name to (B, K, C, H, W) and ``RUN/LAYER`` to (B, C, H, W), float32 on this module's device.
        """
        means = self._split(self.scale.run_mean, self.layers), self._split(self.scale.attention_mean, self.beside)
        scales = self._split(self.scale.run_scale, self.layers), self._split(self.scale.attention_scale, self.beside)
        return (
            {name: _scaled(maps.layers[name], means[0][name], scales[0][name]) for name in self.layers},
            {name: _scaled(maps.beside[name], means[1][name], scales[1][name]) for name in self.beside},
        )

    @staticmethod
    def _split(values: Tensor, layers: Shapes) -> dict[str, Tensor]:
        parts = torch.split(values, [shape[0] for shape in layers.values()], -1)
        return dict(zip(layers, parts, strict=True))


class _Moments:
    """Running mean and deviation of maps (.., C, H, W); images are merged one by one, in float64.

    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm", 1979: stable for means far from 0.
    """

    def __init__(self) -> None:
        self.images = 0
        self._mean = torch.zeros(())
        self._variance = torch.zeros(())

    def update(self, maps: Tensor) -> None:
        for image in maps:  # one by one: the float64 copy stays small
            variance, mean = torch.var_mean(image.double(), (-2, -1), correction=0)
            self.images += 1
            part = 1 / self.images
            apart = mean - self._mean.to(mean.device)
            self._variance = (1 - part) * self._variance.to(mean.device) + part * variance
            self._variance += part * (1 - part) * apart.square()
            self._mean = mean - (1 - part) * apart

    @property
    def mean(self) -> Tensor:
        return self._mean.float()

    @property
    def deviation(self) -> Tensor:
        return self._variance.sqrt().float()


def _joined(moments: dict[str, _Moments], what: str, dim: int) -> Tensor:
    return torch.cat([getattr(one, what) for one in moments.values()], dim)


def _scaled(values: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    wide = values.to(mean.device).float()  # widened there: half the bytes travel
    return (wide - mean[..., None, None]).mul_(scale[..., None, None])

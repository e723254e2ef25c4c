"""Passes of one model over images, in batches of one size, for several steerings.

Shapes: n rows asked for, B the batch size of every forward, C channels, H W map height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from featstore.errors import BadRequestError, unknown_name
from featstore.extraction.batch import Forward
from featstore.extraction.conditioning import Conditioner, ImageConditions
from featstore.extraction.fixed_texts import FixedTexts
from featstore.extraction.host import HostMaps
from featstore.extraction.images import UInt8Array, to_pixels
from featstore.extraction.passes import Item, Pass, items, sharing
from featstore.extraction.taps import Maps, TapSession, select
from featstore.store import precision as precisions
from featstore.store.precision import StoredMaps

if TYPE_CHECKING:
    from featstore.models.backbones.base import Backbone
    from featstore.techniques.base import Steering


class Extractor:
    """Runs a backbone under several steerings and reads layers.

    Every forward, of the VAE too, has the one batch size; short batches are padded with copies of their last row.
    So, on one kind of device, the bytes of a row depend on its image, its noise and its steering, and not on the
    rows beside it.
    On a CPU the number of torch's threads is part of the kind of device: at some batch sizes (measured: below 16)
    oneDNN takes other convolution kernels, with other last bits, for another number of threads.

    Args:
        backbone: the loaded model.
        steerings: what passes can ask for, by index. Their ControlNets and LoRAs are loaded here.
        layers: names of the layers that each pass gives.
        batch_size: rows of every forward.
        height_px: height of the model's input.
        width_px: width of the model's input.
        precision: what maps are kept as: ``float16``, ``float32`` or ``int8``.

    Raises:
        BadRequestError: for an unknown layer or precision, a size that the model cannot take, weights that do not
            fit it.
    """

    def __init__(
        self,
        backbone: Backbone,
        steerings: Sequence[Steering],
        layers: Sequence[str],
        *,
        batch_size: int,
        height_px: int,
        width_px: int,
        precision: str = "float16",
    ) -> None:
        if batch_size < 1:
            raise BadRequestError(f"batch size {batch_size} is below 1")
        precisions.of(precision)
        if not layers:
            raise BadRequestError("no layers are asked for")
        backbone.source.check_image_size(height_px, width_px)
        for layer in layers:
            if layer not in backbone.source.taps:
                raise unknown_name("layer", layer, backbone.source.taps)
        self.backbone = backbone
        self.layers = tuple(dict.fromkeys(layers))
        self.batch_size = batch_size
        self.height_px = height_px
        self.width_px = width_px
        self.precision = precision
        self._taps = select(backbone.source.taps, self.layers)
        self._conditioner = Conditioner(backbone, steerings)
        self._forward = Forward(self._conditioner, self._taps, height_px, width_px)
        on_gpu = backbone.device.type == "cuda"
        self._copies = torch.cuda.Stream(backbone.device) if on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def steerings(self) -> tuple[Steering, ...]:
        """What passes can ask for."""
        return self._conditioner.steerings

    def encode(self, images: UInt8Array) -> torch.Tensor:
        """What is noised, for images: see `Backbone.encode_images`.

        Args:
            images: uint8 (n, height_px, width_px, 3), RGB, as `prepare` gives them.

        Returns:
            (n, C, h, w), on the backbone's device, in its compute dtype.
        """
        self._check_images(images)
        with torch.inference_mode():
            parts = []
            for start in range(0, len(images), self.batch_size):
                # Padded with the last row, as every forward is.
                rows = np.minimum(np.arange(start, start + self.batch_size), len(images) - 1)
                parts.append(self.backbone.encode_images(to_pixels(images[rows])))
            if not parts:
                source, dtype = self.backbone.source, self.backbone.dtype
                height, width = self._forward.latent_size
                return torch.empty((0, source.latent_channels, height, width), dtype=dtype, device=self.backbone.device)
            return torch.cat(parts)[: len(images)]

    def run(
        self,
        steering: int,
        latents: torch.Tensor,
        images: UInt8Array,
        digests: Sequence[str],
        timestep: int,
        seed: int,
        captions: Sequence[str] | None = None,
        *,
        denoise_from: int | None = None,
        noise_ensemble: int = 1,
    ) -> tuple[dict[str, StoredMaps], dict[int, str]]:
        """One pass over all images; see `run_all` for what its arguments are.

        Returns:
            The maps of each layer, (n, C, H, W) in the precision asked for, and the rows whose maps are not fit to
            be stored, with the reason (NaN or infinity, overflow of float16). Other rows are not touched by those.
        """
        one = Pass(
            steering=steering,
            rows=np.arange(len(images)),
            timestep=timestep,
            seed=seed,
            captions=captions,
            denoise_from=denoise_from,
            noise_ensemble=noise_ensemble,
        )
        ((_, maps),) = self.run_all(latents, images, digests, [one])
        return maps.wait()

    def run_all(
        self, latents: torch.Tensor, images: UInt8Array, digests: Sequence[str], passes: Sequence[Pass]
    ) -> Iterator[tuple[int, HostMaps]]:
        """Noise the latents and read the layers; rows come out the same whatever stands beside them.

        Passes in which the same modules act share batches. The device works on the next pass while the maps of the
        last are copied; `HostMaps.wait` waits for those of one.

        Args:
            latents: (n, C, h, w) from `encode`.
            images: the uint8 (n, height_px, width_px, 3) that they come from; ControlNets see them.
            digests: SHA-256 of each image, which its noise comes from.
            passes: what is asked for.

        Yields:
            The index of each pass and its maps, as soon as its last batch is under way.

        Raises:
            BadRequestError: if lengths differ, a timestep is out of range or captions are missing.
        """
        self._check_run(latents, images, digests, passes)
        seen = ImageConditions(images)
        for indices in sharing(passes, self.steerings):
            rows = items(passes, indices)
            ends = {index: len(items(passes, indices[: place + 1])) for place, index in enumerate(indices)}
            results = {
                index: HostMaps(len(passes[index].rows), self.precision, self._copies, passes[index].projections)
                for index in indices
            }
            means = _Means()
            # Its hooks do nothing between its passes, so that they may stay while the caller has the maps.
            with (
                FixedTexts(self._conditioner.networks(passes[indices[0]].steering)) as texts,
                TapSession(self.backbone.denoiser, self._taps) as session,
            ):
                for start in range(0, len(rows), self.batch_size):
                    batch = rows[start : start + self.batch_size]
                    padded = [*batch, *[batch[-1]] * (self.batch_size - len(batch))]
                    maps = self._forward.run(session, texts, passes, padded, latents, digests, seen)
                    for index, position, values in means.add(passes, batch, maps):
                        for layer, value in values.items():
                            results[index].put(layer, position, value)
                    for index in indices:
                        if start < ends[index] <= start + len(batch):
                            yield index, results.pop(index)

    def _check_images(self, images: UInt8Array) -> None:
        wanted = (self.height_px, self.width_px, 3)
        if images.dtype != np.uint8 or images.shape[1:] != wanted:
            raise BadRequestError(
                f"images are uint8 (n, {wanted[0]}, {wanted[1]}, 3), got {images.dtype} {images.shape}"
            )

    def _check_run(
        self, latents: torch.Tensor, images: UInt8Array, digests: Sequence[str], passes: Sequence[Pass]
    ) -> None:
        self._check_images(images)
        lengths = {"latents": len(latents), "images": len(images), "digests": len(digests)}
        if len(set(lengths.values())) != 1 or not len(images):
            raise BadRequestError(f"rows do not match or are none: {lengths}")
        for one in passes:
            one.check(self.backbone.timesteps)
            if self.steerings[one.steering].prompt is None and one.captions is None:
                raise BadRequestError("this steering takes a caption an image, and none are given")


class _Means:
    """Maps averaged over draws of the noise, in float32, in the order of the draws whatever the batches."""

    def __init__(self) -> None:
        self._sums: Maps = {}

    def add(self, passes: Sequence[Pass], batch: Sequence[Item], maps: Maps) -> Iterator[tuple[int, int, Maps]]:
        """Take the maps of a batch; yield those that are whole: pass, first position, (b, C, H, W) a layer."""
        start = 0
        while start < len(batch):
            index = batch[start].index
            draws = passes[index].noise_ensemble
            if draws == 1:
                stop = start
                while stop < len(batch) and batch[stop].index == index:
                    stop += 1
                yield index, batch[start].position, {layer: value[start:stop] for layer, value in maps.items()}
                start = stop
                continue
            for layer, value in maps.items():
                row = value[start : start + 1].float()
                self._sums[layer] = row if batch[start].draw == 0 else self._sums[layer] + row
            if batch[start].draw == draws - 1:
                yield index, batch[start].position, {layer: total / draws for layer, total in self._sums.items()}
            start += 1

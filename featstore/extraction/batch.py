"""The forward of one batch: its rows noised, denoised where that is asked for, and their layers read.

Shapes: n images, B rows of the batch, C channels, h w height and width of what is noised, H W of maps.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from featstore.extraction.conditioning import Conditioner, ImageConditions
from featstore.extraction.controlnet import residuals
from featstore.extraction.fixed_texts import FixedTexts
from featstore.extraction.noise import noise
from featstore.extraction.passes import Item, Pass, denoising
from featstore.extraction.taps import Maps, TapSession
from featstore.models.backbones.transfer import to_device
from featstore.models.layers import Read, Tap

if TYPE_CHECKING:
    from featstore.models.backbones.base import Text


class Forward:
    """Runs a batch whose rows share what acts on the model.

    Args:
        conditioner: of the backbone; gives each batch what steers it.
        taps: what is read.
        height_px: height of the model's input.
        width_px: width of the model's input.
    """

    def __init__(self, conditioner: Conditioner, taps: Sequence[Tap], height_px: int, width_px: int) -> None:
        self.backbone = conditioner.backbone
        self._conditioner = conditioner
        self._taps = tuple(taps)
        self._height_px = height_px
        self._width_px = width_px

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of what is noised."""
        factor = self.backbone.source.latent_factor
        return self._height_px // factor, self._width_px // factor

    def run(
        self,
        session: TapSession,
        texts: FixedTexts,
        passes: Sequence[Pass],
        batch: Sequence[Item],
        latents: torch.Tensor,
        digests: Sequence[str],
        images: ImageConditions,
    ) -> Maps:
        """The maps (B, C, H, W) of one batch, whose rows share what acts on them.

        Args:
            session: of the backbone's denoiser, with the taps.
            texts: of the denoiser and of the ControlNets that act on it.
            passes: of the rows.
            batch: the rows.
            latents: (n, C, h, w), on the backbone's device, that rows are taken from.
            digests: SHA-256 of each of the n images.
            images: what ControlNets and IP-Adapters see.
        """
        backbone, conditioner = self.backbone, self._conditioner
        first = passes[batch[0].index]
        steering = conditioner.steerings[first.steering]
        with torch.inference_mode(), conditioner.acting(first.steering):
            words = conditioner.fixed(passes, batch)
            sides = [_Side(conditioner.text(passes, batch), words, conditioner.looks(passes, batch, images))]
            if steering.guidance is not None:
                unseen = conditioner.looks(passes, batch, images, guided=False)
                sides.append(_Side(conditioner.unguided(passes, batch), [""] * len(batch), unseen))
            controls = conditioner.controls(passes, batch, images)
            x = self._noised(passes, batch, latents, digests)
            times = [passes[item.index].timestep for item in batch]
            if first.denoise_from is not None:
                path = denoising(first.denoise_from, first.timestep)
                for now, then in itertools.pairwise(path):
                    outputs = [self._predict(texts, x, [now] * len(batch), side, controls) for side in sides]
                    x = backbone.stepped(x, _guided(outputs, steering.guidance), now, then)
            maps = [session.run(self.latent_size, **self._inputs(texts, x, times, side, controls)) for side in sides]
        if len(maps) == 1:
            return maps[0]
        return {
            # Probabilities are those under the prompt: an extrapolated one is none.
            tap.layer: maps[0][tap.layer]
            if tap.read is Read.ATTENTION
            else _guided([one[tap.layer] for one in maps], steering.guidance)
            for tap in self._taps
        }

    def _noised(
        self, passes: Sequence[Pass], batch: Sequence[Item], latents: torch.Tensor, digests: Sequence[str]
    ) -> torch.Tensor:
        """The rows of a batch, noised: (B, C, h, w)."""
        device, shape = latents.device, tuple(latents.shape[1:])
        levels, drawn = [], []
        for item in batch:
            one = passes[item.index]
            levels.append(one.timestep if one.denoise_from is None else one.denoise_from)
            drawn.append(noise(one.seed, digests[item.row], levels[-1], shape, item.draw))
        rows = to_device(torch.tensor([item.row for item in batch]), device)
        clean, noises = latents[rows], to_device(torch.stack(drawn), device)
        # Row by row the same: nothing is summed over rows.
        noised = [
            self.backbone.noised(clean[start:stop], noises[start:stop], level) for level, start, stop in _spans(levels)
        ]
        return noised[0] if len(noised) == 1 else torch.cat(noised)

    def _inputs(
        self,
        texts: FixedTexts,
        x: torch.Tensor,
        times: Sequence[int],
        side: _Side,
        controls: Sequence[tuple[Any, torch.Tensor, float]],
    ) -> dict[str, Any]:
        timesteps = to_device(torch.tensor(times), x.device)
        inputs = self.backbone.inputs(x, timesteps, side.text, self._height_px, self._width_px)
        texts.speak(inputs.get("encoder_hidden_states"), side.words)
        added = residuals(controls, inputs)
        if side.looks:
            inputs["added_cond_kwargs"] = inputs.get("added_cond_kwargs", {}) | side.looks
        return inputs | added

    def _predict(
        self,
        texts: FixedTexts,
        x: torch.Tensor,
        times: Sequence[int],
        side: _Side,
        controls: Sequence[tuple[Any, torch.Tensor, float]],
    ) -> torch.Tensor:
        output = self.backbone.denoiser(return_dict=False, **self._inputs(texts, x, times, side, controls))
        return self.backbone.prediction(output)


@dataclasses.dataclass(frozen=True, slots=True)
class _Side:
    """What the rows of a batch are steered by: under the prompt, or, for guidance, without it."""

    text: Text
    words: Sequence[str | None]
    """Fixed text of each row; None where a row has its own."""
    looks: dict[str, list[torch.Tensor]]
    """``image_embeds`` of IP-Adapters."""


def _spans(values: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of equal neighbours: (value, start, stop)."""
    start = 0
    for value, run in itertools.groupby(values):
        stop = start + len(list(run))
        yield value, start, stop
        start = stop


def _guided(values: Sequence[torch.Tensor], scale: float | None) -> torch.Tensor:
    """Classifier-free guidance: ``unguided + scale (guided - unguided)`` (Ho and Salimans, 2022), or the one value."""
    if scale is None:
        return values[0]
    guided, unguided = values
    return unguided + scale * (guided - unguided)

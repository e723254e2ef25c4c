"""What steers the rows of a batch: texts, ControlNets' images, LoRAs. Each computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from featstore.errors import BadRequestError
from featstore.extraction.controlnet import condition
from featstore.extraction.detectors import Detectors
from featstore.extraction.images import UInt8Array
from featstore.extraction.passes import Item, Pass

if TYPE_CHECKING:
    from featstore.models.backbones.base import Backbone, Text
    from featstore.techniques.base import Steering
    from featstore.techniques.detectors import DetectorRef

Adapters = tuple[tuple[str, float], ...]
"""LoRAs that act together: (adapter name, scale)."""


class Conditioner:
    """Loads what steerings need, and gives each batch its share.

    Args:
        backbone: the loaded model.
        steerings: what passes ask for by index.
    """

    def __init__(self, backbone: Backbone, steerings: Sequence[Steering]) -> None:
        self.backbone = backbone
        self.steerings = tuple(steerings)
        self.adapters: list[Adapters] = [
            tuple((backbone.lora(ref.path, ref.digest), ref.scale) for ref in steering.loras)
            for steering in self.steerings
        ]
        self._detectors = Detectors(backbone.device)
        for steering in self.steerings:
            for ref in steering.controlnets:
                backbone.controlnet(ref.folder, ref.digest)
                self._detectors.load(ref.detector)
            for adapter in steering.ip_adapters:
                backbone.ip_adapter(adapter.path, adapter.image_encoder, adapter.digest)
        self._texts: dict[tuple[Adapters, int, str | None], Text] = {}
        self._encode_fixed_prompts()

    def text(self, passes: Sequence[Pass], batch: Sequence[Item]) -> Text:
        """Encoded texts of a batch of rows that share their LoRAs, which are enabled."""
        return _stacked([self._text(passes[item.index].steering, self._words(passes, item)) for item in batch])

    def unguided(self, passes: Sequence[Pass], batch: Sequence[Item]) -> Text:
        """What classifier-free guidance leads away from, once a row; see `Backbone.encode_unguided`."""
        return _stacked([self._text(passes[item.index].steering, None) for item in batch])

    def fixed(self, passes: Sequence[Pass], batch: Sequence[Item]) -> list[str | None]:
        """The fixed prompt of each row of a batch; None where a row has a caption of its own."""
        return [self.steerings[passes[item.index].steering].prompt for item in batch]

    def networks(self, steering: int) -> list[Any]:
        """The denoiser and the ControlNets that act on it."""
        refs = self.steerings[steering].controlnets
        return [self.backbone.denoiser, *(self.backbone.controlnet(ref.folder, ref.digest) for ref in refs)]

    def controls(
        self, passes: Sequence[Pass], batch: Sequence[Item], images: ImageConditions
    ) -> list[tuple[Any, torch.Tensor, float]]:
        """ControlNets of a batch whose rows share them, each with its condition (B, 3, H, W) and scale."""
        backbone, rows = self.backbone, [item.row for item in batch]
        return [
            (
                backbone.controlnet(ref.folder, ref.digest),
                images.rows(self._detectors, ref.detector, rows).to(backbone.dtype),
                ref.scale,
            )
            for ref in self.steerings[passes[batch[0].index].steering].controlnets
        ]

    def acting(self, steering: int) -> contextlib.ExitStack:
        """Context in which the LoRAs and IP-Adapters of a steering act on the model."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.backbone.adapted(self.adapters[steering]))
            for ref in self.steerings[steering].ip_adapters:
                stack.enter_context(self.backbone.looking(ref.digest, ref.scale))
            return stack.pop_all()

    def looks(
        self, passes: Sequence[Pass], batch: Sequence[Item], images: ImageConditions, *, guided: bool = True
    ) -> dict[str, list[torch.Tensor]]:
        """``image_embeds`` of a batch whose rows share their IP-Adapters, one (B, 1, ..) each; empty without any.

        Args:
            passes: of the rows.
            batch: the rows.
            images: what is seen.
            guided: False: what stands for no image.
        """
        found = [
            torch.cat([images.seen(self.backbone, ref.digest, item.row if guided else None) for item in batch])
            for ref in self.steerings[passes[batch[0].index].steering].ip_adapters
        ]
        return {"image_embeds": found} if found else {}

    def _words(self, passes: Sequence[Pass], item: Item) -> str:
        one = passes[item.index]
        prompt = self.steerings[one.steering].prompt
        if prompt is not None:
            return prompt
        if one.captions is None:
            raise BadRequestError("this steering takes a caption an image, and none are given")
        return one.captions[item.position]

    def _text(self, steering: int, words: str | None) -> Text:
        """A text under the steering's LoRAs, which are enabled, or what stands for none; encoded once."""
        backbone, chunks = self.backbone, self.steerings[steering].prompt_chunks
        key = (self.adapters[steering], chunks, words)
        if key not in self._texts:
            self._texts[key] = (
                backbone.encode_unguided(chunks) if words is None else backbone.encode_text(words, chunks)
            )
        return self._texts[key]

    def _encode_fixed_prompts(self) -> None:
        for index, steering in enumerate(self.steerings):
            with self.backbone.adapted(self.adapters[index]):
                if steering.prompt is not None:
                    self._text(index, steering.prompt)
                if steering.guidance is not None:
                    self._text(index, None)
        if all(steering.prompt is not None for steering in self.steerings):
            # Its memory on the device is better used for maps; `encode_text` brings it back if it is needed.
            self.backbone.offload_text()


class ImageConditions:
    """What detectors see in the images at hand, each once for all passes and timesteps.

    Args:
        images: uint8 (n, H, W, 3), RGB, at the size of the model's input.
    """

    def __init__(self, images: UInt8Array) -> None:
        self._images = images
        self._seen: dict[tuple[DetectorRef, int], UInt8Array] = {}
        self._embeds: dict[tuple[str, int | None], torch.Tensor] = {}

    def rows(self, detectors: Detectors, ref: DetectorRef, rows: Sequence[int]) -> torch.Tensor:
        """Conditions of some images: float32 (B, 3, H, W) in [0, 1], on the detectors' device.

        Each image is seen alone, so that its condition does not depend on its company.
        """
        for row in rows:
            if (ref, row) not in self._seen:
                self._seen[ref, row] = detectors.see(self._images[row], ref)
        return condition([self._seen[ref, row] for row in rows], detectors.device)

    def seen(self, backbone: Backbone, digest: str, row: int | None) -> torch.Tensor:
        """What an IP-Adapter is fed for one image, or for none; see `Backbone.see`."""
        if (digest, row) not in self._embeds:
            self._embeds[digest, row] = backbone.see(digest, None if row is None else self._images[row])
        return self._embeds[digest, row]


def _stacked(texts: Sequence[Text]) -> Text:
    """Texts of one row each as one of many."""
    first = texts[0]
    if all(text is first for text in texts):
        return {name: value.expand(len(texts), *value.shape[1:]) for name, value in first.items()}
    return {name: torch.cat([text[name] for text in texts]) for name in first}

"""The images that a gate judges by, decoded and resized once."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from featstore.datasets import Sample, UnreadableImageError
from featstore.errors import BadRequestError
from featstore.pipelines.gate.config import MIN_IMAGES
from featstore.pipelines.gate.planning import GatePlan

UInt8Array = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """n images."""

    samples: tuple[Sample, ...]
    """Their keys and digests."""
    pixels: UInt8Array
    """uint8 (n, H, W, 3), RGB, at the size of the model's input."""
    seen: UInt8Array
    """What ControlNets and IP-Adapters see, of the same shape: the same, unless the gate is misled."""

    @property
    def digests(self) -> list[str]:
        """SHA-256 of each image."""
        return [sample.digest for sample in self.samples]

    @property
    def keys(self) -> list[str]:
        """Key of each image."""
        return [sample.key for sample in self.samples]

    def only(self, good: npt.NDArray[np.bool_]) -> Images:
        """Those of a mask (n,)."""
        samples = tuple(sample for sample, sound in zip(self.samples, good, strict=True) if sound)
        return Images(samples=samples, pixels=self.pixels[good], seen=self.seen[good])


def read_images(plan: GatePlan) -> tuple[Images, dict[str, str]]:
    """The plan's images, and why others could not be read, by key.

    Raises:
        BadRequestError: if too few can.
    """
    from featstore.extraction.images import prepare

    found: list[tuple[Sample, UInt8Array]] = []
    failed: dict[str, str] = {}
    for sample in plan.samples:
        try:
            found.append((sample, prepare(plan.extract.dataset.image(sample.key), *plan.size_px)))
        except UnreadableImageError as error:
            failed[sample.key] = str(error)
    require(len(found), failed)
    pixels = np.stack([image for _, image in found])
    seen = np.roll(pixels, -1, axis=0) if plan.config.misled else pixels
    return Images(samples=tuple(sample for sample, _ in found), pixels=pixels, seen=seen), failed


def require(count: int, failed: dict[str, str]) -> None:
    """Refuse to judge by fewer than two images.

    Raises:
        BadRequestError: with the first reason.
    """
    if count < MIN_IMAGES:
        reason = f": {next(iter(failed.values()))}" if failed else ""
        raise BadRequestError(f"{count} of the images can be judged by, and a gate needs {MIN_IMAGES} or more{reason}")

"""What a data set is to the rest of the library: an ordered list of samples with images and, perhaps, labels.

Nothing here imports torch. Arrays are numpy: images uint8 (H, W, 3) RGB in 0..255, masks uint8 (H, W).
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image

from featstore.errors import BadRequestError, FeatstoreError

UInt8Array = npt.NDArray[np.uint8]

IGNORE_LABEL = 255
"""Label of pixels that count for nothing."""


class UnreadableImageError(FeatstoreError):
    """One image (or its mask) cannot be read: truncated, no image at all, too large, gone.

    A run records it as failed, skips it and goes on.
    """


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image of a data set, without its pixels."""

    key: str
    """Name of the image, unique in the data set."""
    digest: str
    """SHA-256 (64 hex digits) of the image's bytes: of the file, or of the raw RGB pixels of a rendered image."""
    split: str
    """``train``, ``val`` or ``test``; ``all`` where a data set has no splits."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """What is known of a data set before any of its images is read."""

    name: str
    """Name in a store's paths: ``[a-z0-9._-]``, beginning with a letter or digit."""
    title: str
    """A few words for people."""
    classes: tuple[str, ...] = ()
    """Class names in label order; empty where they are unknown."""
    ignore_label: int = IGNORE_LABEL
    """Label of pixels that count for nothing."""
    plain_prompt: str
    """Text of the unsteered pass, e.g. "a horse"."""
    prompt: str | None = None
    """The one fixed detailed text of the technique ``prompt``; None: the data set has none."""
    quality_words: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Words that its model was trained with, in place of those of `prompt:low` and `prompt:high`, by variant."""
    model: str = "reference"
    """Name of the model that the data set is extracted with unless another is asked for."""
    image_size_px: int | None = None
    """Default height and width of the model's input; None: the model's own default."""
    label_size_px: int | None = None
    """Default height and width of the label grid that heads are trained and scored on; None: that of the masks."""
    source: str
    """Where the data comes from, a sentence."""

    def __post_init__(self) -> None:
        """Refuse names that would not be a path component."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", self.name):
            raise BadRequestError(f"data set name {self.name!r} is not of [a-z0-9._-], beginning with [a-z0-9]")


class Dataset(abc.ABC):
    """An ordered list of samples, their images and what is known about them.

    Creating one checks what can be checked without decoding pixels; digests are computed when
    ``samples`` is first read.
    """

    @property
    @abc.abstractmethod
    def info(self) -> DatasetInfo:
        """What is known of the whole."""

    @property
    @abc.abstractmethod
    def samples(self) -> tuple[Sample, ...]:
        """All samples in order. The first read may hash every file; later reads cost nothing."""

    @abc.abstractmethod
    def image(self, key: str) -> UInt8Array:
        """The pixels of one image: uint8 (H, W, 3), RGB, 0..255, turned upright by its EXIF orientation.

        Raises:
            UnreadableImageError: with the reason, if there is no image in the file.
            BadRequestError: if the data set has no such key.
        """

    @abc.abstractmethod
    def mask(self, key: str) -> UInt8Array | None:
        """The labels of one image: uint8 (h, w), `DatasetInfo.ignore_label` for "no label"; None if it has none.

        h, w are those of the image, except in sets that come with labels of their own resolution;
        `featstore.datasets.base.resize_mask` brings them to a common grid.

        Raises:
            UnreadableImageError: if the mask's file is damaged or holds values outside 0..255.
            BadRequestError: if the data set has no such key.
        """

    def caption(self, key: str, kind: str) -> str:
        """The text of one image for ``prompt:caption``.

        Args:
            key: the image.
            kind: which of the data set's captions.

        Raises:
            BadRequestError: if the data set has no captions, no such kind or no such key.
        """
        raise BadRequestError(
            f"data set {self.info.name!r} has no captions (asked for {kind!r} of {key!r})",
            hint="use `prompt`, the data set's fixed text, or a text of your own",
        )

    @property
    def caption_source(self) -> str | None:
        """Identity of the per-image captions, for recipes, e.g. ``toyhorse/fine/1``; None: there are none."""
        return None


def resize_mask(mask: UInt8Array, height_px: int, width_px: int) -> UInt8Array:
    """The labels (h, w) on another grid: uint8 (height_px, width_px), each pixel the nearest label."""
    if mask.shape == (height_px, width_px):
        return mask
    resized = Image.fromarray(mask).resize((width_px, height_px), Image.Resampling.NEAREST)
    return np.asarray(resized, dtype=np.uint8)

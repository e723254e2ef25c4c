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
class Keypoints:
    """Named points of the one object that an image is annotated with."""

    names: tuple[str, ...]
    """P names; equal names of two images of one category mean the same point."""
    xy_px: npt.NDArray[np.float32]
    """(P, 2) float32: x and y in pixels of the image as `Dataset.image` gives it, pixel centres at .5."""
    visible: npt.NDArray[np.bool_]
    """(P,) bool: False for points that are hidden, outside or not annotated; their ``xy_px`` means nothing."""
    box_px: tuple[float, float, float, float]
    """x0, y0, x1, y1 of the object in the same pixels, x1 and y1 exclusive."""
    category: str
    """What the object is, e.g. ``horse``; only images of one category are paired."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two images whose points are matched: from the points of the source those of the target are looked for."""

    source: str
    """Key of the image whose points are given."""
    target: str
    """Key of the image in which they are looked for."""
    split: str
    """``train``, ``val`` or ``test``."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DatasetInfo:
    """What is known of a data set before any of its images is read."""

    name: str
    """Name in a store's paths: ``[a-z0-9._-]``, beginning with a letter or digit."""
    title: str
    """A few words for people."""
    classes: tuple[str, ...] = ()
    """Class names in label order; empty where they are unknown."""
    image_classes: tuple[str, ...] = ()
    """Names of the classes that whole images belong to, in label order; empty where images have none."""
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

    def image_as(self, key: str, digest: str) -> UInt8Array:
        """`image`, of the bytes that were listed; for who has not listed them, on another machine perhaps.

        Args:
            key: the image.
            digest: `Sample.digest` where it was listed.

        Raises:
            UnreadableImageError: as `image`, and if the bytes here are others, as far as the data set can tell.
            BadRequestError: as `image`.
        """
        return self.image(key)

    @abc.abstractmethod
    def mask(self, key: str) -> UInt8Array | None:
        """The labels of one image: uint8 (h, w), `DatasetInfo.ignore_label` for "no label"; None if it has none.

        h, w are those of the image, except in sets that come with labels of their own resolution;
        `featstore.datasets.base.resize_mask` brings them to a common grid.

        Raises:
            UnreadableImageError: if the mask's file is damaged or holds values outside 0..255.
            BadRequestError: if the data set has no such key.
        """

    def image_label(self, key: str) -> int | None:
        """The class of one image, an index into `DatasetInfo.image_classes`; None: it has none.

        Raises:
            BadRequestError: if the data set has no such key.
        """
        return None

    def keypoints(self, key: str) -> Keypoints | None:
        """The annotated points of one image; None: it has none.

        Raises:
            UnreadableImageError: if the annotation's file is damaged.
            BadRequestError: if the data set has no such key.
        """
        return None

    @property
    def pairs(self) -> tuple[Pair, ...] | None:
        """The pairs that the data set itself scores correspondence on; None: any two images of one category."""
        return None

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


def other_bytes(name: object) -> UnreadableImageError:
    """The error for an image whose bytes are not those that were listed."""
    return UnreadableImageError(f"{name}: its bytes are not those that were listed")


def resize_mask(mask: UInt8Array, height_px: int, width_px: int) -> UInt8Array:
    """The labels (h, w) on another grid: uint8 (height_px, width_px), each pixel the nearest label."""
    if mask.shape == (height_px, width_px):
        return mask
    resized = Image.fromarray(mask).resize((width_px, height_px), Image.Resampling.NEAREST)
    return np.asarray(resized, dtype=np.uint8)

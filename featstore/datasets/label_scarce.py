"""The label-scarce sets of ddpm-segmentation, in that project's own layout on disk.

``<data root>/<set>/real/{train,test}/NAME.png`` with labels ``NAME.npy`` (uint8, H x W) beside each.
Source of the layout, the names of classes and folders and the ignored labels: Baranchuk et al.,
"Label-Efficient Semantic Segmentation with Diffusion Models", ICLR 2022, and its public annotations.
The prompts of Horse-21 and Bedroom-28 are those of GATE (Meng et al., NeurIPS 2024); the others are
written in the same manner.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from featstore.datasets.base import IGNORE_LABEL, Dataset, DatasetInfo, UInt8Array
from featstore.datasets.entries import DatasetEntry
from featstore.datasets.files import FileDataset, FileItem
from featstore.datasets.label_scarce_classes import (
    ADE_BEDROOM_30,
    BEDROOM_28,
    CAT_15,
    CELEBA_19,
    FFHQ_34,
    HORSE_21,
)
from featstore.datasets.pixels import IMAGE_SUFFIXES
from featstore.errors import NotFoundError

SPLITS = ("train", "test")
ARCHIVE_URL = "https://storage.yandexcloud.net/yandex-research/ddpm-segmentation/datasets.tar.gz"
SOURCE = "the archive datasets.tar.gz (47 MB) linked in the README of github.com/yandex-research/ddpm-segmentation"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LabelScarceSpec:
    """What sets one of the sets apart."""

    folder: str
    """Its folder in the archive."""
    title: str
    classes: tuple[str, ...]
    plain_prompt: str
    prompt: str
    unlabelled: int | None = None
    """A label that stands for "no label" in its files; it comes out as 255."""


_HIGH_QUALITY = "high quality, best quality, highly realistic, masterpiece"
SPECS: dict[str, LabelScarceSpec] = {
    "horse21": LabelScarceSpec(
        folder="horse_21",
        title="Horse-21: parts of horses",
        classes=HORSE_21,
        plain_prompt="a horse",
        prompt=f"a horse, {_HIGH_QUALITY}",
    ),
    "bedroom28": LabelScarceSpec(
        folder="bedroom_28",
        title="Bedroom-28: furniture and its parts",
        classes=BEDROOM_28,
        plain_prompt="a bedroom",
        prompt="a photo of a tidy and well-designed bedroom",
        unlabelled=0,
    ),
    "ffhq34": LabelScarceSpec(
        folder="ffhq_34",
        title="FFHQ-34: parts of faces",
        classes=FFHQ_34,
        plain_prompt="a face",
        prompt=f"a portrait photo of a human face, {_HIGH_QUALITY}",
    ),
    "cat15": LabelScarceSpec(
        folder="cat_15",
        title="Cat-15: parts of cats",
        classes=CAT_15,
        plain_prompt="a cat",
        prompt=f"a cat, {_HIGH_QUALITY}",
    ),
    "celeba19": LabelScarceSpec(
        folder="celeba_19",
        title="CelebA-19: parts of faces",
        classes=CELEBA_19,
        plain_prompt="a face",
        prompt=f"a portrait photo of a human face, {_HIGH_QUALITY}",
    ),
    "ade-bedroom30": LabelScarceSpec(
        folder="ade_bedroom_30",
        title="ADE-Bedroom-30: things in bedrooms",
        classes=ADE_BEDROOM_30,
        plain_prompt="a bedroom",
        prompt="a photo of a tidy and well-designed bedroom",
    ),
}


class LabelScarceDataset(FileDataset):
    """One of the sets; keys are ``train/NAME.png`` and ``test/NAME.png``, train first.

    Raises:
        NotFoundError: if the files are absent; says where they belong and where they come from.
    """

    def __init__(self, name: str, root: Path) -> None:
        spec = SPECS[name]
        self._unlabelled = spec.unlabelled
        items = [item for split in SPLITS for item in _items(root / "real", split)]
        if absent := [split for split in SPLITS if not any(item.split == split for item in items)]:
            places = " and ".join(str(root.absolute() / "real" / split) for split in absent)
            raise NotFoundError(
                f"data set {name!r}: no images in {places}",
                hint=f"`featstore datasets fetch {name}` gets them; or unpack {SOURCE} ({ARCHIVE_URL}) into "
                f"{root.parent.absolute()}, "
                "or name the folder that holds it with --data-root or $FEATSTORE_DATA",
            )
        info = DatasetInfo(
            name=name,
            title=spec.title,
            classes=spec.classes,
            plain_prompt=spec.plain_prompt,
            prompt=spec.prompt,
            model="sd15",
            label_size_px=256,
            source=SOURCE,
        )
        super().__init__(info, root, items)

    def mask(self, key: str) -> UInt8Array | None:
        """The labels, uint8 (h, w), at the resolution they come in; what the set leaves unlabelled is 255."""
        mask = super().mask(key)
        if mask is None or self._unlabelled is None:
            return mask
        return np.where(mask == self._unlabelled, np.uint8(IGNORE_LABEL), mask)


def _items(real: Path, split: str) -> list[FileItem]:
    folder = real / split
    images = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    items = []
    for image in images:
        mask = image.with_suffix(".npy")
        key = image.relative_to(real).as_posix()
        items.append(FileItem(key=key, image=image, mask=mask if mask.exists() else None, split=split))
    return items


def _open(where: Path | None, *, name: str) -> Dataset:
    return LabelScarceDataset(name, Path(SPECS[name].folder) if where is None else where)


ENTRIES: dict[str, DatasetEntry] = {
    name: DatasetEntry(
        title=spec.title,
        how_to_get=f"unpack {SOURCE} into the data root ({ARCHIVE_URL})",
        opener=functools.partial(_open, name=name),
        folder=spec.folder,
        probe="real/train",
    )
    for name, spec in SPECS.items()
}
"""One entry a set, for the registry."""

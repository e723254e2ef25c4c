"""ADE20K's scene parsing benchmark: photographs of all kinds of scenes, every pixel one of 150 classes.

``<data root>/ADEChallengeData2016/images/{training,validation}/ADE_train_00000001.jpg`` with labels
``annotations/{training,validation}/ADE_train_00000001.png``: 0 is unlabelled, 1..150 are the classes.
Source: Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017. The prompt is GATE's (Meng et al.,
NeurIPS 2024) without the names of the classes, of which a text encoder of 77 tokens takes only the first.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from typing_extensions import override

from featstore.datasets.ade20k_classes import ADE_150
from featstore.datasets.base import IGNORE_LABEL, Dataset, DatasetInfo, UInt8Array, UnreadableImageError
from featstore.datasets.entries import DatasetEntry
from featstore.datasets.files import FileDataset, FileItem
from featstore.datasets.pixels import IMAGE_SUFFIXES
from featstore.errors import NotFoundError

FOLDER = "ADEChallengeData2016"
SPLITS = {"training": "train", "validation": "val"}
"""Its folders, and the splits that they are."""
ARCHIVE_URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
SOURCE = (
    "ADEChallengeData2016.zip (970 MB) of ADE20K's scene parsing benchmark, sceneparsing.csail.mit.edu, "
    "for non-commercial research"
)
INFO = DatasetInfo(
    name="ade20k",
    title="ADE20K: scenes, indoors and outdoors, in 150 classes",
    classes=ADE_150,
    plain_prompt="a photo",
    prompt=(
        "a highly realistic photo of the real world. It can be an indoor scene, or an outdoor scene, "
        "or a photo of nature. high quality"
    ),
    model="sd15",
    label_size_px=512,
    source=SOURCE,
)


class Ade20k(FileDataset):
    """The benchmark; keys are ``training/NAME.jpg`` and ``validation/NAME.jpg``, training first.

    Raises:
        NotFoundError: if the files are absent; says where they belong and where they come from.
    """

    def __init__(self, root: Path) -> None:
        items = [item for folder in SPLITS for item in _items(root, folder)]
        found = {item.split for item in items}
        if absent := [folder for folder, split in SPLITS.items() if split not in found]:
            places = " and ".join(str(root.absolute() / "images" / folder) for folder in absent)
            raise NotFoundError(
                f"data set 'ade20k': no images in {places}",
                hint=f"`featstore datasets fetch ade20k` gets it; or unpack {SOURCE} ({ARCHIVE_URL}) into "
                f"{root.parent.absolute()}, "
                "or name the folder that holds it with --data-root or $FEATSTORE_DATA",
            )
        super().__init__(INFO, root, items)

    @override
    def mask(self, key: str) -> UInt8Array | None:
        """The labels 0..149, uint8 (h, w), at the image's size; 255 where the set has none."""
        mask = super().mask(key)
        if mask is None:
            return None
        if mask.max(initial=0) > len(ADE_150):
            raise UnreadableImageError(
                f"{self._item(key).mask}: holds {mask.max()}; labels of the scene parsing benchmark are 0..150"
            )
        return np.where(mask == 0, np.uint8(IGNORE_LABEL), mask - np.uint8(1))


def _items(root: Path, folder: str) -> list[FileItem]:
    images, annotations = root / "images" / folder, root / "annotations" / folder
    if not images.is_dir():
        return []
    labelled = {path.stem for path in annotations.glob("*.png")}
    return [
        FileItem(
            key=f"{folder}/{image.name}",
            image=image,
            mask=annotations / f"{image.stem}.png" if image.stem in labelled else None,
            split=SPLITS[folder],
        )
        for image in sorted(images.iterdir())
        if image.suffix.lower() in IMAGE_SUFFIXES and not image.name.startswith(".")
    ]


def _open(where: Path | None) -> Dataset:
    return Ade20k(Path(FOLDER) if where is None else where)


ENTRY = DatasetEntry(
    title=INFO.title,
    how_to_get=f"unpack {SOURCE}, into the data root ({ARCHIVE_URL})",
    opener=_open,
    folder=FOLDER,
    probe="images/training",
)

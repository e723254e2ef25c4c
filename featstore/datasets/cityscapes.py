"""Cityscapes: streets of 50 cities from a car, 2048 x 1024 px, 19 of its 30 classes scored.

``<data root>/cityscapes/leftImg8bit/{train,val,test}/CITY/NAME_leftImg8bit.png`` with fine labels
``gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png``, whose identities are brought to the 19 training labels, or
``NAME_gtFine_labelTrainIds.png``, which hold these already and are preferred. The test images' labels are not
public; what the archive has in their place is not read.
Source: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016; the prompt is
GATE's (Meng et al., NeurIPS 2024).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from typing_extensions import override

from featstore.datasets.base import IGNORE_LABEL, Dataset, DatasetInfo, UInt8Array
from featstore.datasets.entries import DatasetEntry
from featstore.datasets.files import FileDataset, FileItem
from featstore.errors import NotFoundError

FOLDER = "cityscapes"
SPLITS = ("train", "val", "test")
CLASS_IDS: dict[str, int] = {
    **{"road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19},
    **{"traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26},
    **{"truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33},
}
"""The 19 classes in label order, and their identities in ``labelIds`` files."""
SOURCE = (
    "leftImg8bit_trainvaltest.zip (11 GB) and gtFine_trainvaltest.zip (241 MB) of www.cityscapes-dataset.com, "
    "after registration there"
)
INFO = DatasetInfo(
    name="cityscapes",
    title="Cityscapes: streets from a car, in 19 classes",
    classes=tuple(CLASS_IDS),
    plain_prompt="a street",
    prompt=(
        "An urban street scene with multiple lanes, various buildings, traffic lights, cars in the lanes, "
        "and pedestrians, highly realistic"
    ),
    model="sd15",
    label_size_px=None,  # the extraction's size: these images are not square, and nobody has to extract them so
    source=SOURCE,
)

_IMAGE, _IDS, _TRAIN_IDS = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"
_LABEL_OF_ID = np.full(256, IGNORE_LABEL, np.uint8)
_LABEL_OF_ID[list(CLASS_IDS.values())] = np.arange(len(CLASS_IDS))


class Cityscapes(FileDataset):
    """The finely labelled part; keys are ``train/CITY/NAME.png``, the splits in the order train, val, test.

    Raises:
        NotFoundError: if there are no training or validation images; says where they belong and come from.
    """

    def __init__(self, root: Path) -> None:
        items = [item for split in SPLITS for item in _items(root, split)]
        found = {item.split for item in items}
        if absent := [split for split in ("train", "val") if split not in found]:
            places = " and ".join(str(root.absolute() / "leftImg8bit" / split / "CITY") for split in absent)
            raise NotFoundError(
                f"data set 'cityscapes': no images in {places}",
                hint=f"unpack {SOURCE}, into {root.absolute()}, "
                "or name the folder above it with --data-root or $FEATSTORE_DATA",
            )
        super().__init__(INFO, root, items)

    @override
    def mask(self, key: str) -> UInt8Array | None:
        """The labels 0..18, uint8 (h, w), at the image's size; 255 for all that is not scored."""
        mask = super().mask(key)
        path = self._item(key).mask
        if mask is None or path is None or path.name.endswith(_TRAIN_IDS):
            return mask
        labels: UInt8Array = _LABEL_OF_ID[mask]
        return labels


def _items(root: Path, split: str) -> list[FileItem]:
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    there = {} if split == "test" else {path.name: path for path in labels.glob("*/*_gtFine_label*.png")}
    items = []
    for image in sorted(images.glob(f"*/*{_IMAGE}")):
        name = image.name.removesuffix(_IMAGE)
        mask = there.get(name + _TRAIN_IDS) or there.get(name + _IDS)
        items.append(FileItem(key=f"{split}/{image.parent.name}/{name}.png", image=image, mask=mask, split=split))
    return items


def _open(where: Path | None) -> Dataset:
    return Cityscapes(Path(FOLDER) if where is None else where)


ENTRY = DatasetEntry(
    title=INFO.title,
    how_to_get=f"unpack {SOURCE}, into the folder {FOLDER} of the data root",
    opener=_open,
    folder=FOLDER,
    probe="leftImg8bit/train",
)

"""SPair-71k, the benchmark of semantic correspondence, in its archive's own layout on disk.

::

    <data root>/SPair-71k/
      JPEGImages/CATEGORY/NAME.jpg
      ImageAnnotation/CATEGORY/NAME.json     points ("kps": number -> [x, y] or null) and box ("bndbox") of one image
      Layout/large/{trn,val,test}.txt        pairs, one a line: NUMBER-SOURCE-TARGET:CATEGORY
      PairAnnotation/{trn,val,test}/PAIR.json

Min, Lee, Ponce and Cho, "SPair-71k: A Large-scale Benchmark for Semantic Correspondence", 2019 (arXiv
1908.10543). A pair's file repeats the two images' boxes and those of their points that both show; so the
70,958 of them are not read, only their names where the folder Layout is missing. The prompt is that of
GATE (Meng et al., NeurIPS 2024).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from featstore.datasets.base import Dataset, DatasetInfo, Keypoints, Pair, UnreadableImageError
from featstore.datasets.entries import DatasetEntry
from featstore.datasets.files import FileDataset, FileItem
from featstore.errors import CorruptError, NotFoundError

CATEGORIES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dog", "horse", "motorbike",
    "person", "pottedplant", "sheep", "train", "tvmonitor",
)  # fmt: skip
"""The 18 categories, as their folders are called."""
ARCHIVE_URL = "http://cvlab.postech.ac.kr/research/SPair-71k/data/SPair-71k.tar.gz"
SOURCE = f"the archive SPair-71k.tar.gz of cvlab.postech.ac.kr/research/SPair-71k ({ARCHIVE_URL})"

_SPLITS = {"train": "trn", "val": "val", "test": "test"}
_SPOKEN = {"pottedplant": "potted plant", "tvmonitor": "tv monitor"}
_QUALITY = "high quality, best quality, highly realistic, masterpiece, high resolution"
_HINT = "unpack the archive again"
_MISSING = 3

INFO = DatasetInfo(
    name="spair71k",
    title="SPair-71k: pairs of images of 18 categories with corresponding points",
    plain_prompt="a photo",
    prompt=f"a photo of {', '.join(_SPOKEN.get(name, name) for name in CATEGORIES)}, {_QUALITY}",
    model="sd15",
    source=SOURCE,
)


class SPair71k(FileDataset):
    """1,800 images and 70,958 pairs.

    Keys are ``CATEGORY/NAME.jpg``: a picture may be in two categories, with other points.
    Samples come split by split (train, val, test, then images without a pair, whose split is ``all``) and in each
    category by category, so that images that are read together lie together in a store.

    Raises:
        NotFoundError: if the files, or images that pairs name, are absent; says where they belong.
        CorruptError: if a list of pairs is none, or puts an image into two splits.
    """

    def __init__(self, root: Path) -> None:
        images = {
            f"{category}/{path.name}": path
            for category in CATEGORIES
            for path in sorted((root / "JPEGImages" / category).glob("*.jpg"))
        }
        if not images:
            raise NotFoundError(
                f"data set 'spair71k': no images in {root.absolute() / 'JPEGImages'}",
                hint=f"`featstore datasets fetch spair71k` gets it; or unpack {SOURCE} into {root.parent.absolute()}, "
                "or name the folder that holds it with --data-root or $FEATSTORE_DATA",
            )
        self._pairs = tuple(pair for split in _SPLITS for pair in _read_pairs(root, split, images))
        split_of = _splits(self._pairs)
        rank = {split: number for number, split in enumerate((*_SPLITS, "all"))}
        items = [
            FileItem(key=key, image=path, mask=None, split=split_of.get(key, "all")) for key, path in images.items()
        ]
        # sorted() is stable: categories and names keep their order in each split
        super().__init__(INFO, root, sorted(items, key=lambda item: rank[item.split]))

    @property
    @override
    def pairs(self) -> tuple[Pair, ...]:
        return self._pairs

    @override
    def keypoints(self, key: str) -> Keypoints:
        item = self._item(key)
        category = item.image.parent.name
        path = self.root / "ImageAnnotation" / category / f"{item.image.stem}.json"
        try:
            return _keypoints(json.loads(path.read_bytes()), category)
        except OSError as error:
            raise UnreadableImageError(f"{path}: {error.strerror or error}", hint=_HINT) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnreadableImageError(f"{path} is no annotation of an image: {error!r}", hint=_HINT) from error


def _read_pairs(root: Path, split: str, images: dict[str, Path]) -> list[Pair]:
    """The pairs of a split, in the order of its list."""
    short = _SPLITS[split]
    layout, folder = root / "Layout" / "large" / f"{short}.txt", root / "PairAnnotation" / short
    if layout.is_file():
        place, names = layout, layout.read_text(encoding="utf-8", errors="replace").split()
    elif folder.is_dir():
        place, names = folder, sorted(path.stem for path in folder.glob("*.json"))
    else:
        raise NotFoundError(f"data set 'spair71k': neither {layout} nor {folder} is there", hint=_HINT)
    found, absent = [], []
    for name in names:
        pair = _pair(name, split, images)
        if pair is None:
            absent.append(name)
        else:
            found.append(pair)
    if absent:
        some = ", ".join(repr(name) for name in absent[:_MISSING])
        raise NotFoundError(
            f"data set 'spair71k': {place} names {len(absent)} of {len(names)} pairs that are no "
            f"NUMBER-SOURCE-TARGET:CATEGORY of images in {root / 'JPEGImages'}, e.g. {some}",
            hint=_HINT,
        )
    return found


def _pair(name: str, split: str, images: dict[str, Path]) -> Pair | None:
    """The pair of a name such as ``000001-2007_000033-2007_000821:aeroplane``; None where an image is not there."""
    stems, _, category = name.rpartition(":")
    words = stems.split("-")[1:]
    for cut in range(1, len(words)):  # the stem of an image may itself hold hyphens
        source, target = (f"{category}/{'-'.join(some)}.jpg" for some in (words[:cut], words[cut:]))
        if source in images and target in images:
            return Pair(source=source, target=target, split=split)
    return None


def _splits(pairs: tuple[Pair, ...]) -> dict[str, str]:
    """The split of every image that is in a pair."""
    found: dict[str, str] = {}
    for pair in pairs:
        for key in (pair.source, pair.target):
            if found.setdefault(key, pair.split) != pair.split:
                raise CorruptError(
                    f"data set 'spair71k': {key!r} is in pairs of {found[key]!r} and of {pair.split!r}", hint=_HINT
                )
    return found


def _keypoints(document: dict[str, Any], category: str) -> Keypoints:
    """The points of one image's annotation; ValueError, KeyError, TypeError or AttributeError if it is none.

    Annotated points are whole pixels, counted from 0: their centres are half a pixel further on. The box is left as
    it is, because PCK is measured by the difference of its sides.
    """
    if document["category"] != category:
        raise ValueError(f"it is of category {document['category']!r}, its folder is {category!r}")
    points = document["kps"]
    xy = np.zeros((len(points), 2), np.float32)
    visible = np.zeros(len(points), bool)
    for row, (name, place) in enumerate(points.items()):
        if place is None:
            continue
        if not isinstance(place, list) or len(place) != 2 or not all(map(_is_number, place)):
            raise ValueError(f"point {name!r} is {place!r}, not [x, y] or null")
        xy[row], visible[row] = np.add(place, 0.5), True
    box = document["bndbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(f"bndbox is {box!r}, not [x0, y0, x1, y1]")
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"bndbox {box!r} has no extent")
    x0, y0, x1, y1 = map(float, box)
    return Keypoints(names=tuple(points), xy_px=xy, visible=visible, box_px=(x0, y0, x1, y1), category=category)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _open(where: Path | None) -> Dataset:
    return SPair71k(Path("SPair-71k") if where is None else where)


ENTRY = DatasetEntry(
    title=INFO.title,
    how_to_get=f"unpack {SOURCE} into the data root",
    opener=_open,
    folder="SPair-71k",
    probe="JPEGImages",
)

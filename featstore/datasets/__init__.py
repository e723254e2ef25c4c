"""Samples in: the embedded data set, folders of images, public sets in their own layouts, and the Hugging Face Hub.

A new data set is one file with a `Dataset`, and one line here.
"""

from __future__ import annotations

from pathlib import Path

from featstore.datasets.ade20k import ENTRY as _ADE20K
from featstore.datasets.base import (
    Dataset,
    DatasetInfo,
    Keypoints,
    Pair,
    Sample,
    UnreadableImageError,
    resize_mask,
)
from featstore.datasets.cifar10 import ENTRY as _CIFAR10
from featstore.datasets.cityscapes import ENTRY as _CITYSCAPES
from featstore.datasets.embedded import DEGRADED_ENTRY as _TOYHORSE_DEGRADED
from featstore.datasets.embedded import ENTRY as _TOYHORSE
from featstore.datasets.entries import DATA_ROOT_VARIABLE, DATASETS, DatasetEntry, resolve_data_root
from featstore.datasets.folder import ENTRY as _FOLDER
from featstore.datasets.folder import FolderDataset
from featstore.datasets.hub import ENTRY as _HUB
from featstore.datasets.hub import PREFIX as _HUB_PREFIX
from featstore.datasets.hub import HubDataset
from featstore.datasets.label_scarce import ENTRIES as _LABEL_SCARCE
from featstore.datasets.spair71k import ENTRY as _SPAIR71K
from featstore.errors import BadRequestError

__all__ = [
    "DATASETS",
    "DATA_ROOT_VARIABLE",
    "Dataset",
    "DatasetEntry",
    "DatasetInfo",
    "Keypoints",
    "Pair",
    "Sample",
    "UnreadableImageError",
    "resize_mask",
    "resolve",
    "resolve_data_root",
]

_FOLDER_PREFIX = "folder:"

DATASETS.register("toyhorse", _TOYHORSE)
DATASETS.register("toyhorse-degraded", _TOYHORSE_DEGRADED)
DATASETS.register("folder:PATH", _FOLDER)
for _name, _entry in _LABEL_SCARCE.items():
    DATASETS.register(_name, _entry)
DATASETS.register("spair71k", _SPAIR71K)
DATASETS.register("ade20k", _ADE20K)
DATASETS.register("cityscapes", _CITYSCAPES)
DATASETS.register("cifar10", _CIFAR10)
DATASETS.register("hub:OWNER/NAME", _HUB)


def resolve(name: str, *, data_root: Path | None = None) -> Dataset:
    """The data set that ``name`` stands for, checked as far as that needs no pixels.

    Args:
        name: ``toyhorse``, ``folder:PATH``, ``hub:OWNER/NAME``, ``horse21`` and the others of `DATASETS`.
        data_root: where sets with files of their own are looked for; None: ``$FEATSTORE_DATA``, else ``./data``.

    Raises:
        BadRequestError: for an unknown name, an empty folder, a mask of another size than its image.
        NotFoundError: if the set's files are absent; the hint says where they belong and where they come from.
    """
    if name.startswith(_FOLDER_PREFIX):
        path = name.removeprefix(_FOLDER_PREFIX)
        if not path:
            raise BadRequestError("'folder:' names no folder", hint="write folder:PATH, e.g. folder:./photos")
        return FolderDataset(Path(path).expanduser(), taken_names=frozenset(DATASETS))
    if name == "folder":
        raise BadRequestError("'folder' names no folder", hint="write folder:PATH, e.g. folder:./photos")
    if name == "hub":
        raise BadRequestError("'hub' names no data set", hint="write hub:OWNER/NAME, e.g. hub:uoft-cs/cifar10")
    if name.startswith(_HUB_PREFIX):
        return HubDataset(name.removeprefix(_HUB_PREFIX), taken_names=frozenset(DATASETS))
    if name not in tuple(DATASETS) and ("/" in name or Path(name).is_dir()):
        raise BadRequestError(
            f"unknown data set {name!r}; known: {', '.join(DATASETS)}",
            hint=f"for a folder of images write folder:{name}",
        )
    entry = DATASETS[name]
    return entry.opener(entry.where(data_root))

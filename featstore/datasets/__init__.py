"""Samples in: the embedded data set, folders of images, and the label-scarce sets.

A new data set is one file with a `Dataset`, and one line here.
"""

from __future__ import annotations

from pathlib import Path

from featstore.datasets.base import (
    Dataset,
    DatasetInfo,
    Keypoints,
    Pair,
    Sample,
    UnreadableImageError,
    resize_mask,
)
from featstore.datasets.embedded import ENTRY as _TOYHORSE
from featstore.datasets.entries import DATA_ROOT_VARIABLE, DATASETS, DatasetEntry, resolve_data_root
from featstore.datasets.folder import ENTRY as _FOLDER
from featstore.datasets.folder import FolderDataset
from featstore.datasets.label_scarce import ENTRIES as _LABEL_SCARCE
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
DATASETS.register("folder:PATH", _FOLDER)
for _name, _entry in _LABEL_SCARCE.items():
    DATASETS.register(_name, _entry)


def resolve(name: str, *, data_root: Path | None = None) -> Dataset:
    """The data set that ``name`` stands for, checked as far as that needs no pixels.

    Args:
        name: ``toyhorse``, ``folder:PATH``, ``horse21`` and the others of `DATASETS`.
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
    if name not in tuple(DATASETS) and ("/" in name or Path(name).is_dir()):
        raise BadRequestError(
            f"unknown data set {name!r}; known: {', '.join(DATASETS)}",
            hint=f"for a folder of images write folder:{name}",
        )
    entry = DATASETS[name]
    return entry.opener(entry.where(data_root))

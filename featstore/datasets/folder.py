"""``folder:PATH``: any folder of images, with masks beside them if there are any.

Images are all files with an image suffix, in sub folders too; hidden files and folders are left out.
A sample's key is its path below the folder; samples are sorted by it. If the first folder of the path
is ``train``, ``val`` or ``test``, that is the split, else ``all``.

The mask of ``P/NAME.jpg`` is the one of these that exists (two are refused):

- ``P/NAME.npy``
- ``P/NAME_mask.png``, as long as ``P/NAME.<image suffix>`` exists; otherwise that is an image itself
- ``P/masks/NAME.npy`` or ``P/masks/NAME.png``
- ``P/../masks/NAME.npy`` or ``.png`` where P is called ``images``

Where every image lies in ``CLASS/NAME`` or every one in ``SPLIT/CLASS/NAME``, its folder is also the class of the whole
image; folders called ``images`` are none.

So ``NAME.png`` beside ``NAME.jpg`` is an image, and what lies in folders called ``masks`` never is.
Labels are class indices, 255 for "no label".
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import override

from featstore.datasets.base import Dataset, DatasetInfo
from featstore.datasets.entries import DatasetEntry
from featstore.datasets.files import CACHE_FROM_BYTES, FileDataset, FileItem
from featstore.datasets.pixels import IMAGE_SUFFIXES, image_size, mask_size
from featstore.errors import BadRequestError
from featstore.recipe import sha256_hex

SPLITS = ("train", "val", "test")
MASKS_FOLDER = "masks"
MASK_SUFFIX = "_mask"
_RESERVED_NAMES = frozenset({"catalog", "catalog.json", "zarr.json", "c"})


class FolderDataset(FileDataset):
    """The images below a folder, with their masks.

    Raises:
        BadRequestError: if the folder is absent or holds no image, if a mask has another size than
            its image or is no mask, if a file name is not UTF-8. Pixels are not decoded for that.
    """

    def __init__(
        self, root: Path, *, taken_names: frozenset[str] = frozenset(), cache_from_bytes: int = CACHE_FROM_BYTES
    ) -> None:
        if not root.is_dir():
            what = "is a file, not a folder" if root.is_file() else "does not exist"
            raise BadRequestError(f"folder {str(root)!r} {what}", hint="name a folder that holds images")
        images, masks, in_masks_folders = _scan(root)
        if not images:
            raise BadRequestError(
                f"folder {str(root)!r} holds no image; looked for {', '.join(IMAGE_SUFFIXES)}, in sub folders too",
                hint="name a folder that holds images",
            )
        items = [_item(root, path, masks) for path in images]
        if in_masks_folders and all(item.mask is None for item in items):
            count, example = len(in_masks_folders), _key(root, min(in_masks_folders))
            raise BadRequestError(
                f"folder {str(root)!r} holds {count} masks, e.g. {example!r}, but none belongs to an image",
                hint="the mask of NAME.jpg is masks/NAME.png or masks/NAME.npy",
            )
        for item in items:
            _check_mask(item)
        self._folder_classes = _folder_classes(items)
        info = DatasetInfo(
            name=_store_name(root, taken_names),
            title=f"images of {root.resolve().name}",
            image_classes=self._folder_classes,
            plain_prompt="a photo",
            source=f"the folder {root.resolve()}",
        )
        super().__init__(info, root, items, cache_from_bytes=cache_from_bytes)

    @override
    def image_label(self, key: str) -> int | None:
        folder = self._item(key).key.split("/")[-2:-1]
        return self._folder_classes.index(folder[0]) if self._folder_classes else None


def _scan(root: Path) -> tuple[list[Path], dict[Path, Path], list[Path]]:
    """What lies below ``root``; links to folders are followed.

    Returns:
        The images, sorted by key; everything that may be a mask, by its path with a lower-case
        suffix; those of it that lie in folders for masks.
    """
    found: list[Path] = []
    arrays: list[Path] = []
    in_masks_folders: list[Path] = []
    visited: set[str] = set()
    for folder_name, sub_folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder_name)
        if real in visited:  # a link that leads back up
            sub_folders.clear()
            continue
        visited.add(real)
        sub_folders[:] = sorted(name for name in sub_folders if not name.startswith("."))
        folder = Path(folder_name)
        in_masks = MASKS_FOLDER in folder.relative_to(root).parts
        for name in names:
            path = folder / name
            if name.startswith(".") or not (path.is_file() or not path.exists()):
                continue  # hidden, or a pipe or device; a broken link stays and is reported as unreadable
            suffix = path.suffix.lower()
            if in_masks:
                if suffix in (".png", ".npy"):
                    in_masks_folders.append(path)
            elif suffix in IMAGE_SUFFIXES:
                found.append(path)
            elif suffix == ".npy":
                arrays.append(path)
    stems = {path.with_suffix("") for path in found}
    named_masks = {
        path
        for path in found
        if path.suffix.lower() == ".png"
        and path.stem.endswith(MASK_SUFFIX)
        and path.with_name(path.stem.removesuffix(MASK_SUFFIX)) in stems
    }
    images = sorted((path for path in found if path not in named_masks), key=lambda path: _key(root, path))
    masks = {path.with_suffix(path.suffix.lower()): path for path in [*arrays, *in_masks_folders, *named_masks]}
    return images, masks, in_masks_folders


def _key(root: Path, path: Path) -> str:
    key = path.relative_to(root).as_posix()
    try:
        key.encode()
    except UnicodeEncodeError:
        raise BadRequestError(f"file name {key!r} in {root} is not UTF-8", hint="rename the file") from None
    return key


def _item(root: Path, image: Path, masks: dict[Path, Path]) -> FileItem:
    stem, folder = image.stem, image.parent
    candidates = [folder / f"{stem}.npy", folder / f"{stem}{MASK_SUFFIX}.png"]
    mask_folders = [folder / MASKS_FOLDER]
    if folder.name == "images" and folder != root:
        mask_folders.append(folder.parent / MASKS_FOLDER)
    candidates += [mask_folder / f"{stem}{suffix}" for mask_folder in mask_folders for suffix in (".npy", ".png")]
    there = [masks[path] for path in candidates if path in masks]
    if len(there) > 1:
        raise BadRequestError(
            f"image {_key(root, image)!r} has more than one mask: {', '.join(_key(root, path) for path in there)}",
            hint="keep one of them",
        )
    key = _key(root, image)
    first = key.split("/")[0].lower() if "/" in key else ""
    return FileItem(key=key, image=image, mask=there[0] if there else None, split=first if first in SPLITS else "all")


def _folder_classes(items: Sequence[FileItem]) -> tuple[str, ...]:
    """Names of the folders that whole images are sorted into, ascending; empty where the folder is not of that form."""
    if {(item.key.count("/"), item.split != "all") for item in items} not in ({(1, False)}, {(2, True)}):
        return ()
    names = tuple(sorted({item.key.split("/")[-2] for item in items}))
    return () if "images" in names else names


def _check_mask(item: FileItem) -> None:
    if item.mask is None:
        return
    mask = mask_size(item.mask)
    image = image_size(item.image)
    if image is not None and image != mask:
        raise BadRequestError(
            f"mask {item.mask} is {mask[1]} x {mask[0]} px, its image {item.image} is {image[1]} x {image[0]} px",
            hint="a mask has the width and height of its image (turned upright, if the camera noted a rotation)",
        )


def _store_name(root: Path, taken_names: frozenset[str]) -> str:
    """The folder's own name, made fit for a store path and kept apart from the names of known data sets."""
    own = root.resolve().name
    name = re.sub(r"[^a-z0-9._-]", "_", own.lower())[:60].lstrip("._-").rstrip("_.")
    if not name:
        return f"folder-{sha256_hex(own.encode('utf-8', 'surrogateescape'))[:8]}"
    return f"folder-{name}" if name in _RESERVED_NAMES or name in taken_names else name


def _open(_where: Path | None) -> Dataset:
    raise BadRequestError("folder:PATH stands for a folder of yours", hint="e.g. folder:./photos")


ENTRY = DatasetEntry(
    title="your own images, with masks beside them if you have any",
    how_to_get="name any folder of images in place of PATH, e.g. folder:./photos",
    opener=_open,
)

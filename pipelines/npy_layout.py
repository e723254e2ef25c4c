"""Which image and layer each file of a folder of ``.npy`` files is of.

Feature folders made with the public code of generic-diffusion-feature have one of these layouts, where NAME is the
image (see `featstore.pipelines.npy_names`; with nested inputs it is PARENT/NAME):

- ``layer-first``: ``LAYER/NAME.npy``
- ``image-first``: ``NAME/LAYER.npy``
- ``aggregate``: ``NAME.npy``, all layers resized to the largest and concatenated along the channels
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from featstore.errors import BadRequestError, unknown_name
from featstore.pipelines.npy_files import SUFFIX
from featstore.pipelines.npy_names import ByPosition, Names, own_names
from featstore.store import SampleTable
from featstore.store import layout as store_layout

LAYOUTS = ("layer-first", "image-first", "aggregate")
AGGREGATE = "aggregate"
"""Layer that the maps of the layout of this name are stored as."""
RENAMED = {"attn": "attn-all"}
"""Layers of such folders that are stored under another name: heads know attention by the prefix."""
_SHOWN = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    """What the files of a folder are."""

    layout: str
    """One of `LAYOUTS`."""
    names: str
    """How images are named: ``stem``, ``position`` or ``listed``."""
    files: Mapping[str, Mapping[int, str]]
    """Path below the folder by row of the image, by layer."""
    strangers: tuple[str, ...]
    """Paths of files that belong to no image."""


def find_files(folder: Path) -> list[str]:
    """Paths of all ``.npy`` files below ``folder``, with forward slashes, sorted.

    What is hidden, no regular file, or a link that leads nowhere, is left out.
    """
    found: list[str] = []
    visited: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = [Path(place) / name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]
        # A pipe would be waited for when it is digested.
        found += [path.relative_to(folder).as_posix() for path in here if path.is_file()]
    return sorted(found)


def split_path(layout: str, path: str) -> tuple[str, str] | None:
    """Name of the image and of the layer that a path stands for in a layout; None if it cannot stand there."""
    bare = path.removesuffix(SUFFIX)
    if layout == "aggregate":
        return bare, AGGREGATE
    if "/" not in bare:
        return None
    first, _, rest = bare.partition("/")
    before, _, last = bare.rpartition("/")
    return (rest, first) if layout == "layer-first" else (before, last)


def assign(
    paths: Sequence[str],
    table: SampleTable,
    names: Sequence[Names],
    *,
    layout: str | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Assigned:
    """Find the layout and the way of naming under which the files are of images, and what each then is.

    Args:
        paths: `find_files`.
        table: the images.
        names: ways of naming images, the first that any file fits is taken.
        layout: one of `LAYOUTS`; None: the one that fits.
        renamed: name of a layer in the store by its name in the folder.

    Raises:
        BadRequestError: if no file is of an image, several layouts fit, two files are of the same image and layer,
            or a layer cannot be called so.
    """
    if layout is not None and layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)
    levels = set() if layout else {part for key in table.keys for own in own_names(key)[:2] for part in own.split("/")}
    for kind in names:
        tried = [_assign(paths, kind, one, levels, renamed or {}) for one in (LAYOUTS if layout is None else (layout,))]
        fitting = [found for found in tried if found.files]
        if len(fitting) > 1:
            counts = ", ".join(f"{found.layout} ({len(paths) - len(found.strangers)} files)" for found in fitting)
            raise BadRequestError(
                f"the files fit several layouts: {counts}", hint="--layout names the one that is meant"
            )
        if fitting:
            return fitting[0]
    shown = ", ".join(repr(path) for path in paths[:_SHOWN])
    keys = ", ".join(repr(key) for key in table.keys[:_SHOWN])
    raise BadRequestError(
        f"none of {len(paths)} files ({shown}, ..) is called like one of the {len(table)} images ({keys}, ..)",
        hint=f"files lie as LAYER/IMAGE{SUFFIX}, IMAGE/LAYER{SUFFIX} or IMAGE{SUFFIX}, where IMAGE is the image's name "
        "without suffix, or train0, train1, .. by position",
    )


def check_counted(assigned: Assigned, names: ByPosition) -> None:
    """Make sure that files which count images count exactly the images that there are.

    A position says nothing of the image: had the folder one image less then, every row after it would be another's.

    Raises:
        BadRequestError: if a split's files are fewer or more than its images.
    """
    covered = {row for rows in assigned.files.values() for row in rows}
    for split, rows in names.counted.items():
        there = [row for row in rows if row in covered]
        beyond = next((path for path in assigned.strangers if _is_beyond(assigned.layout, names, split, path)), None)
        if there and (len(there) < len(rows) or beyond is not None):
            wrong = f"there is {beyond!r}" if beyond is not None else f"only {len(there)} have a file"
            raise BadRequestError(
                f"the files count images, but not those of split {split!r}: it has {len(rows)}, and {wrong}",
                hint="--names position takes them all the same, if the numbers are those of this data set",
            )


def _is_beyond(layout: str, names: ByPosition, split: str, path: str) -> bool:
    parts = split_path(layout, path)
    at = names.position(parts[0]) if parts is not None else None
    return at is not None and at[0] == split


def _assign(paths: Sequence[str], names: Names, layout: str, levels: set[str], renamed: Mapping[str, str]) -> Assigned:
    files: dict[str, dict[int, str]] = {}
    strangers: list[str] = []
    rows: dict[str, int | None] = {}
    for path in paths:
        parts = split_path(layout, path)
        # A folder of images is no layer: cats/01.npy is an image of cats, not the image 01 in a layer cats.
        if parts is None or (layout != "aggregate" and parts[1] in levels):
            strangers.append(path)
            continue
        name, layer = parts[0], renamed.get(parts[1], parts[1])
        if name not in rows:
            rows[name] = names.find(name)
        row = rows[name]
        if row is None:
            strangers.append(path)
            continue
        if not store_layout.is_segment(layer):
            raise BadRequestError(
                f"layer {layer!r} of {path!r} cannot be a name in a store",
                hint=f"--rename {layer}=NAME gives it another",
            )
        own = files.setdefault(layer, {})
        if row in own:
            raise BadRequestError(f"{own[row]!r} and {path!r} are both layer {layer!r} of the same image")
        own[row] = path
    return Assigned(layout=layout, names=names.kind, files=files, strangers=tuple(strangers))

"""What a folder of ``.npy`` files holds: whose maps, of what shape, and what is wrong with them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featstore.datasets.files import file_digests
from featstore.errors import BadRequestError, NotFoundError
from featstore.pipelines import export_index, npy_layout
from featstore.pipelines.npy_files import Header, UnusableMapError, read_header
from featstore.pipelines.npy_layout import Assigned
from featstore.pipelines.npy_names import ByPosition, ByStem, Listed, Names
from featstore.pipelines.progress import Progress
from featstore.recipe import canonical_json, sha256_hex
from featstore.store import SampleTable
from featstore.store.layout import Shape

NAMES = ("stem", "position")
CHANGED = "the image has changed since its features were exported"
_THREADS = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The files of a folder, as far as that needs no map."""

    assigned: Assigned
    layers: Mapping[str, Shape]
    """Shape (C, H, W) of each layer that is asked for: that of most of its files."""
    dtypes: frozenset[np.dtype[Any]]
    """Element types of all files that hold maps of images."""
    digests: Mapping[str, str]
    """SHA-256 (hex) of every file below the folder, by path."""
    names_digest: str | None
    """SHA-256 (hex) of what names stand for, where they do not say it themselves."""
    failed: Mapping[int, str]
    """Rows that were asked for and have files, but cannot be imported, with the reason."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the names and contents of all files."""
        return sha256_hex(canonical_json({"featstore_import": 1, "files": dict(self.digests)}))

    def complete(self, rows: Sequence[int]) -> list[int]:
        """Those of ``rows`` that have a usable file of every layer."""
        return [row for row in rows if row not in self.failed and self._has_files(row)]

    def without(self, rows: Sequence[int]) -> list[int]:
        """Those of ``rows`` that have no file at all."""
        return [row for row in rows if row not in self.failed and not self._has_files(row)]

    def _has_files(self, row: int) -> bool:
        return any(row in self.assigned.files[layer] for layer in self.layers)


def survey(
    folder: Path,
    table: SampleTable,
    wanted: Sequence[int],
    *,
    progress: Progress,
    layout: str | None = None,
    naming: str | None = None,
    layers: Sequence[str] | None = None,
    renamed: Mapping[str, str] | None = None,
    listed: bool = False,
) -> Survey:
    """Find out what lies in ``folder``; reads every file once to digest it, unless its digest is cached.

    Args:
        folder: where the files lie.
        table: the images of the data set.
        wanted: rows that are asked for.
        progress: told of every file that is digested.
        layout: one of `npy_layout.LAYOUTS`; None: the one that fits.
        naming: one of `NAMES`; None: what fits.
        layers: names, as the store is to have them; None: all.
        renamed: name of a layer in the store by its name in the folder.
        listed: whether images are named as the list of an export says, which lies in the folder.

    Raises:
        NotFoundError: if there are no such files.
        BadRequestError: for a layer that is not there, and as `npy_layout.assign`.
    """
    paths = npy_layout.find_files(folder)
    if not paths:
        raise NotFoundError(f"there is no .npy file below {folder}")
    changed: dict[int, str] = {}
    by_position = ByPosition(table)
    names: list[Names] = [ByStem(table, wanted), by_position]
    if listed:
        listing, changed = _listed(folder, table)
        names = [listing]
    elif naming is not None:
        names = [kind for kind in names if kind.kind == naming]
    usual = {} if listed else npy_layout.RENAMED
    assigned = npy_layout.assign(
        paths, table, names, layout="layer-first" if listed else layout, renamed=usual | dict(renamed or {})
    )
    if assigned.names == by_position.kind and naming is None:
        npy_layout.check_counted(assigned, by_position)
    chosen = _chosen(layers, assigned)
    headers, unusable = _headers(folder, assigned)
    shapes, failed = _failed(assigned, chosen, wanted, headers, unusable)
    failed |= {row: changed[row] for row in wanted if row in changed}
    identity = next(kind for kind in names if kind.kind == assigned.names).identity
    return Survey(
        assigned=assigned,
        layers=shapes,
        # Of all layers and images, so that the run does not depend on which of them were asked for.
        dtypes=frozenset(header.dtype.newbyteorder("=") for header in headers.values()),
        digests=_digests(folder, paths, progress),
        names_digest=None if identity is None else sha256_hex(canonical_json(identity)),
        failed=failed,
    )


def _listed(folder: Path, table: SampleTable) -> tuple[Listed, dict[int, str]]:
    """The names of an export's list, and the rows whose image is another by now."""
    row_of = {key: row for row, key in enumerate(table.keys)}
    rows, changed, keys = {}, {}, {}
    for one in export_index.read_samples(folder):
        row = row_of.get(one.key)
        keys[one.file] = one.key
        if row is not None and table.digests[row] != one.digest:
            changed[row] = CHANGED
        elif row is not None:
            rows[one.file] = row
    return Listed(rows, keys), changed


def _chosen(layers: Sequence[str] | None, assigned: Assigned) -> list[str]:
    there = ", ".join(assigned.files)
    for name in layers or ():
        if name not in assigned.files:
            raise BadRequestError(f"there are no files of layer {name!r}; there are: {there}")
    return list(dict.fromkeys(layers or assigned.files))


def _headers(folder: Path, assigned: Assigned) -> tuple[dict[str, Header], dict[str, str]]:
    """Headers of all files that belong to images, by path, and what is wrong with those that have no sound one."""
    paths = [path for files in assigned.files.values() for path in files.values()]
    headers, unusable = {}, {}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for path, found in zip(paths, pool.map(_header, [folder / path for path in paths]), strict=True):
            if isinstance(found, Header):
                headers[path] = found
            else:
                unusable[path] = found
    return headers, unusable


def _failed(
    assigned: Assigned,
    layers: Sequence[str],
    wanted: Sequence[int],
    headers: Mapping[str, Header],
    unusable: Mapping[str, str],
) -> tuple[dict[str, Shape], dict[int, str]]:
    """Shapes of ``layers``, and by row of ``wanted`` what is wrong with an image that has files."""
    failed: dict[int, str] = {}
    shapes: dict[str, Shape] = {}
    rows = [row for row in wanted if any(row in assigned.files[layer] for layer in layers)]
    for layer in layers:
        files = assigned.files[layer]
        counts = Counter(headers[path].shape for path in files.values() if path in headers)
        if counts:
            shapes[layer] = counts.most_common(1)[0][0]
        for row in rows:
            if reason := _wrong(files.get(row), layer, shapes.get(layer), headers, unusable):
                failed.setdefault(row, reason)
    return shapes, failed


def _wrong(
    path: str | None, layer: str, shape: Shape | None, headers: Mapping[str, Header], unusable: Mapping[str, str]
) -> str | None:
    """What is wrong with an image's file of a layer; None: nothing that its header tells."""
    if path is None:
        return f"it has no file of layer {layer!r}"
    if path in unusable:
        return f"{path}: {unusable[path]}"
    own = headers[path].shape
    return None if own == shape else f"{path}: its shape is {own}, that of the others {shape}"


def _header(path: Path) -> Header | str:
    try:
        return read_header(path)
    except UnusableMapError as error:
        return str(error)


def _digests(folder: Path, paths: Sequence[str], progress: Progress) -> dict[str, str]:
    progress.start("digesting", len(paths), "files")
    try:
        found = file_digests(folder, [folder / path for path in paths], advance=progress.advance)
    finally:
        progress.stop()
    return dict(zip(paths, found, strict=True))

"""Ways in which files of features are named after images.

- ``stem``: the image file's name without its suffix, the last two levels of its key, or the whole of it
- ``position``: a split and a number, ``train0``, counting that split's images in the order of their keys
- ``listed``: as featstore's own exports have it, by the list that lies beside them
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, Protocol

from featstore.datasets.pixels import IMAGE_SUFFIXES
from featstore.errors import BadRequestError
from featstore.store import SampleTable

_POSITION = re.compile(r"(.*?)(0|[1-9][0-9]*)", re.DOTALL)
_SHOWN = 3


class Names(Protocol):
    """Tells which image a name is of."""

    kind: str
    """``stem``, ``position`` or ``listed``."""

    @property
    def identity(self) -> Mapping[str, Any] | None:
        """What names stand for, as plain JSON; None where a name says itself what it is of."""

    def find(self, name: str) -> int | None:
        """Row of the image in the table; None: the name is of none."""


class ByStem:
    """By the image's own name: its key, the key without the image suffix, or the last one or two levels of that.

    Args:
        table: the images.
        wanted: rows that are asked for; a name that fits several images is of the one that is.
    """

    kind = "stem"

    def __init__(self, table: SampleTable, wanted: Iterable[int]) -> None:
        self._keys = table.keys
        self._wanted = frozenset(wanted)
        self._rows: list[dict[str, list[int]]] = [{}, {}, {}, {}]
        for row, key in enumerate(table.keys):
            for rows, name in zip(self._rows, own_names(key), strict=True):
                rows.setdefault(name, []).append(row)

    @property
    def identity(self) -> None:
        """A name says itself which image it is of."""
        return None

    def find(self, name: str) -> int | None:
        """Row of the image called so.

        Raises:
            BadRequestError: if it fits several that are asked for.
        """
        rows = next((known[name] for known in self._rows if name in known), None)
        if rows is None or len(rows) == 1:
            return None if rows is None else rows[0]
        fitting = [row for row in rows if row in self._wanted]
        if len(fitting) > 1:
            keys = ", ".join(repr(self._keys[row]) for row in fitting[:_SHOWN])
            raise BadRequestError(
                f"files called {name!r} fit {len(fitting)} images: {keys}",
                hint="--split names the images that the folder was made from",
            )
        return fitting[0] if fitting else rows[0]


def own_names(key: str) -> tuple[str, str, str, str]:
    """What files of an image may be called, the fullest name first: all of its key, and less and less of it."""
    path = PurePosixPath(key)
    bare = key[: -len(path.suffix)] if path.suffix.lower() in IMAGE_SUFFIXES else key
    parts = bare.split("/")
    return key, bare, "/".join(parts[-2:]), parts[-1]


class ByPosition:
    """By a split and a number that counts its images, sorted by key."""

    kind = "position"

    def __init__(self, table: SampleTable) -> None:
        self._keys = table.keys
        self.counted: dict[str, list[int]] = {}
        """Rows of each split in the order in which they are counted."""
        for row in sorted(range(len(table)), key=lambda row: table.keys[row]):
            self.counted.setdefault(table.splits[row], []).append(row)

    @property
    def identity(self) -> dict[str, list[str]]:
        """Keys of each split in their order."""
        return {split: [self._keys[row] for row in rows] for split, rows in self.counted.items()}

    def find(self, name: str) -> int | None:
        """Row of the image at that position."""
        at = self.position(name)
        return None if at is None or at[1] >= len(self.counted[at[0]]) else self.counted[at[0]][at[1]]

    def position(self, name: str) -> tuple[str, int] | None:
        """Split and number of a name; None if it is no such name. A data set without splits counts all its images."""
        match = _POSITION.fullmatch(name)
        if match is None or len(match[2]) > 9:
            return None
        only = next(iter(self.counted)) if len(self.counted) == 1 and match[1].isalpha() else None
        split = match[1] if match[1] in self.counted else only
        return None if split is None else (split, int(match[2]))


class Listed:
    """By the list of an export.

    Args:
        rows: row in the table by name, of the images that are in it.
        keys: key by name, of all images in the list.
    """

    kind = "listed"

    def __init__(self, rows: Mapping[str, int], keys: Mapping[str, str]) -> None:
        self._rows = rows
        self._keys = keys

    @property
    def identity(self) -> dict[str, str]:
        """Key by name."""
        return dict(self._keys)

    def find(self, name: str) -> int | None:
        """Row of the image that the list has for this name."""
        return self._rows.get(name)

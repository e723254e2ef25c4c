"""Export to ``.npy``: one file an image and layer, ``LAYER/KEY.npy``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featstore.pipelines.export_writer import Chunk, ExportedLayer, Target
from featstore.pipelines.npy_files import SUFFIX

NAME = "npy"
_HEADER_BYTES = 128
_PART_MAX_BYTES = 200
_PART_KEPT_CHARS = 40
_UNSAFE = re.compile(r'[%\\:*?"<>|\x00-\x1f\x7f]|^\.')


def require(layers: Sequence[str]) -> None:
    """Nothing is needed, and every layer has a name that a folder can have."""


def overhead_bytes(layer: ExportedLayer) -> int:
    """The header of a file."""
    return _HEADER_BYTES


def file_name(key: str) -> str:
    """The path that the files of an image have in a layer's folder, without their suffix; no two keys have the same.

    It is the key. What a file's name cannot hold everywhere, or would lead elsewhere, is written as ``%`` and its
    code in hex; of parts that are too long a beginning and a digest are kept.
    """
    return "/".join(_part(part) for part in key.split("/"))


def _part(part: str) -> str:
    safe = _UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", part) or "%"
    if len(safe.encode()) <= _PART_MAX_BYTES:
        return safe
    return f"{safe[:_PART_KEPT_CHARS]}%{hashlib.sha256(part.encode()).hexdigest()[:32]}"


def open_writer(target: Target) -> NpyWriter:
    """What writes a run."""
    return NpyWriter(target)


class NpyWriter:
    """Writes a file an image and layer."""

    def __init__(self, target: Target) -> None:
        self._folder = target.folder
        self._made: set[Path] = set()

    def write(self, chunk: Chunk) -> list[str]:
        """Write some images; returns their names, without a suffix."""
        names = [file_name(key) for key in chunk.keys]
        for layer, maps in chunk.maps.items():
            for name, one in zip(names, maps, strict=True):
                path = self._folder / layer / f"{name}{SUFFIX}"
                if path.parent not in self._made:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._made.add(path.parent)
                # Never over another: on a disk that takes a.png and A.png for one, one of them would be lost.
                with path.open("xb") as file:
                    np.lib.format.write_array(file, one, allow_pickle=False)
        return names

    def finish(self) -> None:
        """Nothing comes after."""

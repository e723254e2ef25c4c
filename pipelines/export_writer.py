"""What the formats of an export have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from featstore.store import Run
from featstore.store.layout import Shape


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportedLayer:
    """A layer as it comes out of the store."""

    shape: Shape
    """(C, H, W)."""
    dtype: np.dtype[Any]
    """Element type: what is read, which for int8 is float16."""

    @property
    def map_bytes(self) -> int:
        """Bytes of one map."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive images of an export."""

    number: int
    """0 for the first."""
    keys: tuple[str, ...]
    splits: tuple[str, ...]
    digests: tuple[str, ...]
    """SHA-256 (hex) of each image."""
    maps: Mapping[str, npt.NDArray[Any]]
    """(n, C, H, W) by layer."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One run on its way out."""

    folder: Path
    """Where its files go; empty at first."""
    run: Run
    layers: Mapping[str, ExportedLayer]
    chunks: int
    """Number of chunks that will come."""


class Writer(Protocol):
    """Writes one run in one format."""

    def write(self, chunk: Chunk) -> list[str]:
        """Write some images; chunks come in their order. Returns what is called ``file`` in the list, an image each."""

    def finish(self) -> None:
        """Write what comes after all images."""


class Format(Protocol):
    """A module of one format."""

    NAME: str
    """As users type it."""

    def require(self, layers: Sequence[str]) -> None:
        """Refuse what cannot be written before anything is: a package that is absent, a layer of a taken name."""

    def overhead_bytes(self, layer: ExportedLayer) -> int:
        """Bytes that one map takes beside its own."""

    def open_writer(self, target: Target) -> Writer:
        """What writes a run."""

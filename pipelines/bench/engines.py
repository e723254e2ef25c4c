"""Ways to keep maps on a local disk, behind one interface, so that they can be measured beside each other.

Each is used as its documentation suggests for this access pattern, with a checksum where it has one.
Shapes: N images, C channels, H W map height and width.
"""

from __future__ import annotations

import abc
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Maps = npt.NDArray[Any]
"""(N, C, H, W) float16 of one layer."""


class Engine(abc.ABC):
    """One way to keep maps; made for one folder, written once, then read.

    Args:
        folder: an empty folder.
        layers: all maps, by layer; of the same N images.
        block: images of a block: what is written, scanned and handed to dask at once.
        sync: whether a write must be on the disk before it counts as done.
    """

    name: str
    checksum = "none"
    """What finds a flipped bit when an image is read."""
    can_sync = True
    """Whether it can be told to wait for the disk, or not to."""

    def __init__(self, folder: Path, layers: Mapping[str, Maps], *, block: int, sync: bool) -> None:
        self.folder = folder
        self.layers = layers
        self.block = block
        self.sync = sync
        self.n_images = len(next(iter(layers.values())))

    @property
    def n_blocks(self) -> int:
        """Blocks of a layer."""
        return -(-self.n_images // self.block)

    def rows(self, block: int) -> range:
        """The images of a block."""
        return range(block * self.block, min(self.n_images, (block + 1) * self.block))

    def write(self) -> None:
        """Everything, block by block and in each layer by layer, as an extraction does it."""
        for block in range(self.n_blocks):
            rows = self.rows(block)
            for layer, maps in self.layers.items():
                self.write_block(layer, rows, maps[rows.start : rows.stop])

    @abc.abstractmethod
    def write_block(self, layer: str, rows: range, maps: Maps) -> None:
        """One block of one layer."""

    @abc.abstractmethod
    def single(self, layer: str, row: int) -> Any:
        """One image, as an array that nothing else uses."""

    def batch(self, layer: str, rows: Sequence[int]) -> Any:
        """Several images, in any order."""
        return [self.single(layer, row) for row in rows]

    def images(self, layer: str, block: int) -> Any:
        """All images of a block, in whatever shape this engine gives them at the least cost."""
        return self.batch(layer, self.rows(block))

    def read_block(self, layer: str, block: int) -> Maps:
        """All images of a block in one array, (n, C, H, W)."""
        return np.stack(self.images(layer, block))

    def scan(self) -> None:
        """Read everything once, in order, a block at a time."""
        for layer in self.layers:
            for block in range(self.n_blocks):
                self.images(layer, block)

    def lazy(self, layer: str) -> Any:
        """The layer as a dask array, a chunk and a task a block."""
        import dask.array as da

        def read(block_id: tuple[int, ...]) -> Maps:
            return self.read_block(layer, block_id[0])

        shape = self.layers[layer].shape[1:]
        lengths = tuple(len(self.rows(block)) for block in range(self.n_blocks))
        return da.map_blocks(
            read, chunks=(lengths, *((n,) for n in shape)), dtype=np.float16, meta=np.empty((0, 0, 0, 0), np.float16)
        )

    def close(self) -> None:
        """Let go of files."""
        return


def flush(path: Path) -> None:
    """Wait until the file at ``path`` is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


ENGINES: Mapping[str, tuple[str, str]] = {
    "featstore": ("engines_own", "Own"),
    ".npy, a file an image": ("engines_files", "Npy"),
    ".safetensors, a file an image": ("engines_files", "Safetensors"),
    "obstore, an object an image": ("engines_files", "Obstore"),
    "h5py, chunk an image": ("engines_arrays", "Hdf5"),
    "zarr-python, sharded": ("engines_arrays", "ZarrSharded"),
    "zarr-python, a file an image": ("engines_arrays", "ZarrChunked"),
    "tensorstore, sharded": ("engines_arrays", "Tensorstore"),
}
"""Module and class by the name that tables show."""
REFERENCE = ".npy, a file an image"
"""The engine that all others are measured against."""
NEEDS = {"h5py, chunk an image": "h5py", "tensorstore, sharded": "tensorstore"}
"""Packages that featstore itself does without."""


def load() -> tuple[dict[str, type[Engine]], dict[str, str]]:
    """The engines that can be measured here, by name, and why the others cannot."""
    found, missing = {}, {}
    for name, (module, kind) in ENGINES.items():
        try:
            if name in NEEDS:
                importlib.import_module(NEEDS[name])
        except ImportError:
            missing[name] = f"not installed: pip install {NEEDS[name]}"
            continue
        found[name] = getattr(importlib.import_module(f"featstore.pipelines.bench.{module}"), kind)
    return found, missing

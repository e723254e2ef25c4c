"""Engines that keep a file or object an image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import safetensors.numpy
from obstore.store import LocalStore
from typing_extensions import override

from featstore.pipelines.bench.engines import Engine, Maps, flush


class _Files(Engine):
    """A folder a layer, a file an image in it."""

    suffix: str

    def __init__(self, folder: Path, layers: Mapping[str, Maps], *, block: int, sync: bool) -> None:
        super().__init__(folder, layers, block=block, sync=sync)
        for layer in layers:
            (folder / layer).mkdir()
        # Names are made before, so that pathlib is not what is measured.
        self._paths = {
            layer: [str(folder / layer / f"{row}{self.suffix}") for row in range(self.n_images)] for layer in layers
        }


class Npy(_Files):
    """`np.save` and `np.load`."""

    name = "npy"
    suffix = ".npy"

    @override
    def write_block(self, layer: str, rows: range, maps: Maps) -> None:
        paths = self._paths[layer]
        for row, one in zip(rows, maps, strict=True):
            if not self.sync:
                np.save(paths[row], one)
                continue
            with Path(paths[row]).open("wb") as file:
                np.save(file, one)
                file.flush()
                os.fsync(file.fileno())

    @override
    def single(self, layer: str, row: int) -> Any:
        return np.load(self._paths[layer][row])


class Safetensors(_Files):
    """`save_file` and `load_file`."""

    name = "safetensors"
    suffix = ".safetensors"

    @override
    def write_block(self, layer: str, rows: range, maps: Maps) -> None:
        paths = self._paths[layer]
        for row, one in zip(rows, maps, strict=True):
            safetensors.numpy.save_file({"map": one}, paths[row])
            if self.sync:
                flush(Path(paths[row]))

    @override
    def single(self, layer: str, row: int) -> Any:
        return safetensors.numpy.load_file(self._paths[layer][row])["map"]


class Obstore(Engine):
    """Raw bytes put and got through obstore's store for local disks; it knows nothing of syncing."""

    name = "obstore"
    can_sync = False

    def __init__(self, folder: Path, layers: Mapping[str, Maps], *, block: int, sync: bool) -> None:
        super().__init__(folder, layers, block=block, sync=sync)
        self._store = LocalStore(str(folder))

    @override
    def write_block(self, layer: str, rows: range, maps: Maps) -> None:
        for row, one in zip(rows, maps, strict=True):
            obstore.put(self._store, f"{layer}/{row}", one.reshape(-1).view(np.uint8).data, use_multipart=False)

    @override
    def single(self, layer: str, row: int) -> Any:
        data = memoryview(obstore.get(self._store, f"{layer}/{row}").bytes())
        return np.frombuffer(data, np.float16).reshape(self.layers[layer].shape[1:])

"""Engines of array libraries: zarr-python, tensorstore and h5py."""

from __future__ import annotations

import abc
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from typing_extensions import override
from zarr.codecs import Crc32cCodec

from featstore.pipelines.bench.engines import Engine, Maps


class _Arrays(Engine):
    """An array a layer, indexed as numpy's are, a block one array."""

    checksum = "crc32c"

    def __init__(self, folder: Path, layers: Mapping[str, Maps], *, block: int, sync: bool) -> None:
        super().__init__(folder, layers, block=block, sync=sync)
        self._arrays = {layer: self._create(folder / layer, maps) for layer, maps in layers.items()}

    @abc.abstractmethod
    def _create(self, path: Path, maps: Maps) -> Any:
        """An empty array of the shape of ``maps``."""

    @override
    def write_block(self, layer: str, rows: range, maps: Maps) -> None:
        self._arrays[layer][rows.start : rows.stop] = maps

    @override
    def single(self, layer: str, row: int) -> Any:
        return self._arrays[layer][row]

    @override
    def images(self, layer: str, block: int) -> Any:
        rows = self.rows(block)
        return self._arrays[layer][rows.start : rows.stop]

    @override
    def read_block(self, layer: str, block: int) -> Maps:
        values: Maps = self.images(layer, block)
        return values


class ZarrSharded(_Arrays):
    """zarr-python, a shard a block; a batch is read image by image, since a list of indices is far slower."""

    name = "zarr-sharded"
    can_sync = False

    @override
    def _create(self, path: Path, maps: Maps) -> Any:
        return zarr.create_array(
            str(path),
            shape=maps.shape,
            chunks=(1, *maps.shape[1:]),
            shards=(self.block, *maps.shape[1:]),
            dtype=maps.dtype,
            compressors=Crc32cCodec(),
            fill_value=np.nan,
        )


class ZarrChunked(_Arrays):
    """zarr-python, a chunk an image, a file a chunk."""

    name = "zarr-chunked"
    can_sync = False

    @override
    def _create(self, path: Path, maps: Maps) -> Any:
        return zarr.create_array(
            str(path),
            shape=maps.shape,
            chunks=(1, *maps.shape[1:]),
            dtype=maps.dtype,
            compressors=Crc32cCodec(),
            fill_value=np.nan,
        )


class Tensorstore(_Arrays):
    """tensorstore's zarr3 driver, a shard a block."""

    name = "tensorstore"

    @override
    def _create(self, path: Path, maps: Maps) -> Any:
        raw = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        inner = {"chunk_shape": [1, *maps.shape[1:]], "codecs": raw, "index_codecs": raw}
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(path)},
            "context": {"file_io_sync": self.sync},
            "metadata": {
                "shape": list(maps.shape),
                "data_type": "float16",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.block, *maps.shape[1:]]}},
                "fill_value": "NaN",
                "codecs": [{"name": "sharding_indexed", "configuration": inner}],
            },
        }
        return importlib.import_module("tensorstore").open(spec, create=True).result()

    @override
    def write_block(self, layer: str, rows: range, maps: Maps) -> None:
        self._arrays[layer][rows.start : rows.stop].write(maps).result()

    @override
    def single(self, layer: str, row: int) -> Any:
        return self._arrays[layer][row].read().result()

    @override
    def batch(self, layer: str, rows: Sequence[int]) -> Any:
        return self._arrays[layer][list(rows)].read().result()

    @override
    def images(self, layer: str, block: int) -> Any:
        rows = self.rows(block)
        return self._arrays[layer][rows.start : rows.stop].read().result()


class Hdf5(_Arrays):
    """h5py, a file and data set a layer, a chunk an image, with HDF5's own checksum."""

    name = "h5py"
    checksum = "fletcher32"

    @override
    def _create(self, path: Path, maps: Maps) -> Any:
        file = importlib.import_module("h5py").File(f"{path}.h5", "w")
        return file.create_dataset(
            "maps", shape=maps.shape, chunks=(1, *maps.shape[1:]), dtype=maps.dtype, fletcher32=True
        )

    @override
    def write(self) -> None:
        super().write()
        for array in self._arrays.values():
            array.file.flush()

    @override
    def write_block(self, layer: str, rows: range, maps: Maps) -> None:
        array = self._arrays[layer]
        array[rows.start : rows.stop] = maps
        if self.sync:
            array.file.flush()
            os.fsync(array.file.id.get_vfd_handle())

    @override
    def close(self) -> None:
        for array in self._arrays.values():
            array.file.close()

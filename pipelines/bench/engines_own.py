"""featstore's own store as an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

import featstore.store
from featstore.pipelines.bench.engines import Engine, Maps
from featstore.recipe import Recipe
from featstore.store.local import LocalObjects


class Own(Engine):
    """Blocks through `Run.write_block`, rows through `Run.numpy`, blocks through `Run.reader` and ``run[layer]``."""

    name = "featstore"
    checksum = "crc32c"

    def __init__(self, folder: Path, layers: Mapping[str, Maps], *, block: int, sync: bool) -> None:
        super().__init__(folder, layers, block=block, sync=sync)
        url = folder / "features.zarr"
        store = featstore.store.create(url)
        if isinstance(store.objects, LocalObjects):
            store.objects.durable = sync
        count = self.n_images
        table = featstore.store.SampleTable(
            keys=tuple(f"image-{index:05d}" for index in range(count)),
            digests=tuple(f"{index + 1:016x}{0:048x}" for index in range(count)),
            splits=("all",) * count,
        )
        stored = store.put_samples("bench", table, source="a benchmark")
        recipe = Recipe(
            model="none",
            weights_digest="0" * 64,
            technique="basic",
            parameters={},
            timestep=50,
            height_px=512,
            width_px=512,
        )
        shapes = {layer: (maps.shape[1], maps.shape[2], maps.shape[3]) for layer, maps in layers.items()}
        self._run = stored.create_run(recipe, shapes, batch_size=1, provenance={})
        self.block = self._run.block_length
        for layer in layers:
            self._run.reader(layer)  # Looks at the documents of the layer once, as `create_run` of others does.

    @override
    def write(self) -> None:
        for block in range(self.n_blocks):
            rows = self.rows(block)
            self._run.write_block(
                block, rows, {layer: maps[rows.start : rows.stop] for layer, maps in self.layers.items()}
            )

    @override
    def write_block(self, layer: str, rows: range, maps: Maps) -> None:
        self._run.write_block(rows.start // self.block, rows, {layer: maps})

    @override
    def single(self, layer: str, row: int) -> Any:
        return self._run.numpy(layer, [row])

    @override
    def batch(self, layer: str, rows: Sequence[int]) -> Any:
        return self._run.numpy(layer, rows)

    @override
    def images(self, layer: str, block: int) -> Any:
        return self._run.reader(layer).block(block)

    @override
    def read_block(self, layer: str, block: int) -> Maps:
        return self._run.reader(layer).block(block)

    @override
    def lazy(self, layer: str) -> Any:
        return self._run[layer]

"""The store against loose files."""

from __future__ import annotations

import functools
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np

import featstore.store
from featstore.pipelines.bench.config import BenchConfig
from featstore.pipelines.bench.timing import in_turn
from featstore.recipe import Recipe


def bench_store(config: BenchConfig, folder: Path) -> dict[str, Any]:
    """Blocks of SD1.5-sized maps against loose ``.npy`` files: durable writes, and reads of random single images."""
    shape, count = (320, 64, 64), config.images or 64
    maps = np.random.default_rng(config.seed).standard_normal((count, *shape), dtype=np.float32).astype(np.float16)
    digests = tuple(f"{index + 1:064x}" for index in range(count))
    keys = tuple(f"image-{index:04d}" for index in range(count))
    order = np.random.default_rng(config.seed + 1).permutation(count)
    writes, reads = [], []
    for repeat in range(config.repeats):
        store = featstore.store.create(folder / f"{repeat}.zarr")
        table = featstore.store.SampleTable(keys=keys, digests=digests, splits=("all",) * count)
        stored = store.put_samples("bench", table, source="random numbers")
        recipe = Recipe(
            model="none",
            weights_digest="0" * 64,
            technique="basic",
            parameters={},
            timestep=50,
            height_px=512,
            width_px=512,
        )
        run = stored.create_run(recipe, {"map": shape}, batch_size=1, provenance={})

        def write(run: featstore.store.Run = run) -> None:
            for block in range(run.n_blocks):
                rows = run.block_rows(block)
                run.write_block(block, list(rows), {"map": maps[rows.start : rows.stop]})

        loose = folder / f"{repeat}.npy"
        loose.mkdir()
        writes.append(in_turn(repeat, write, functools.partial(_save_loose, loose, maps)))
        reads.append(
            in_turn(
                repeat,
                lambda run=run: [run.numpy("map", [row]) for row in order.tolist()],  # type: ignore[misc]
                lambda loose=loose: [np.load(loose / f"{row}.npy") for row in order.tolist()],  # type: ignore[misc]
            )
        )
    return {
        "megabytes": maps.nbytes / 1e6,
        "write_megabytes_per_second": maps.nbytes / 1e6 / statistics.median(a for a, _ in writes),
        "npy_write_megabytes_per_second": maps.nbytes / 1e6 / statistics.median(b for _, b in writes),
        "write_ratio": statistics.median(b / a for a, b in writes),
        "read_megabytes_per_second": maps.nbytes / 1e6 / statistics.median(a for a, _ in reads),
        "npy_read_megabytes_per_second": maps.nbytes / 1e6 / statistics.median(b for _, b in reads),
        "read_ratio": statistics.median(b / a for a, b in reads),
    }


def _save_loose(folder: Path, maps: np.ndarray) -> None:
    for index, one in enumerate(maps):
        with (folder / f"{index}.npy").open("wb") as file:
            np.save(file, one)
            file.flush()
            os.fsync(file.fileno())

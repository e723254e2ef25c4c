"""Gathering some pixels of many images: in this process, and on one and two workers of this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import featstore.store
from featstore.pipelines.bench.config import BenchConfig
from featstore.pipelines.bench.scale import Table
from featstore.pipelines.cluster.config import ClusterConfig
from featstore.pipelines.cluster.connect import Cluster
from featstore.pipelines.gathering import gather_pixels
from featstore.pipelines.progress import Progress, Silent
from featstore.recipe import Recipe
from featstore.store import SampleTable

if TYPE_CHECKING:
    from featstore.heads.sampled import Gathering

_LAYERS = {"up1": (1280, 16, 16), "up2": (640, 32, 32), "up3": (320, 64, 64)}
"""Shapes (C, H, W) of Stable Diffusion 1.5 at 512 px."""
_GRID = (512, 512)
_PIXELS = 256
_IMAGES = 400


def bench_gather(config: BenchConfig, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Images a second of whom 256 pixels each are gathered, from a warm page cache; medians of all repeats.

    Sides are measured in turn. Workers are there before their clock starts; vectors of all sides are compared.
    """
    # Only now: simulated workers of a cluster import this package, and no torch.
    from featstore.heads.sampled import draw_pixels

    progress = progress or Silent()
    count = config.images or _IMAGES
    gathering, block_length = _store(folder / "s.zarr", count, config)
    rng = np.random.default_rng(config.seed)
    labels = rng.integers(0, 20, _GRID).astype(np.uint8)
    pixels = [draw_pixels(labels, _PIXELS, seed=config.seed, row=row) for row in range(count)]
    seconds: dict[str, list[float]] = {"this process": [], "1 worker": [], "2 workers": []}
    clusters = {"1 worker": ClusterConfig(workers=1), "2 workers": ClusterConfig(workers=2)}
    first: np.ndarray | None = None
    for repeat in range(config.repeats + 1):
        for side, times in seconds.items():
            progress.note(f"{side}, {repeat} of {config.repeats}" if repeat else f"{side}, warming up")
            cluster = None if side not in clusters else Cluster(clusters[side], lambda _: None)
            try:
                if cluster is not None:
                    cluster.client("cpu")
                begin = time.perf_counter()
                runs, _ = gather_pixels(gathering, block_length, range(count), pixels, cluster, Silent())
                times += [time.perf_counter() - begin] if repeat else []
            finally:
                if cluster is not None:
                    cluster.__exit__(None, None, None)
            first = runs if first is None else first
            if not np.array_equal(first, runs):
                raise AssertionError(f"{side} gathered other vectors")
    map_bytes = count * sum(2 * int(np.prod(reader.shape)) for reader in gathering.runs[0].values())
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    return {
        "images": count,
        "map_bytes": map_bytes,
        "vector_bytes": count * _PIXELS * gathering.pixel_bytes,
        "sides": [
            {
                "side": side,
                "seconds": median,
                "images_per_second": count / median,
                "map_mb_per_second": map_bytes / 1e6 / median,
                "of_this_process": medians["this process"] / median,
            }
            for side, median in medians.items()
        ],
    }


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """A row for each side."""
    rows = [
        [row["side"], f"{row['seconds']:.2f}", f"{row['images_per_second']:.1f}", f"{row['of_this_process']:.2f}"]
        for row in figures["sides"]
    ]
    return [("gathering pixels", ["side", "seconds", "images a second", "of this process"], rows)]


def _store(place: Path, count: int, config: BenchConfig) -> tuple[Gathering, int]:
    """A store of one run of random maps of Stable Diffusion's shapes, channels divided by ``config.shrink``."""
    from featstore.heads.sampled import Gathering

    store = featstore.store.create(place)
    keys = tuple(f"{number:06d}.png" for number in range(count))
    digests = tuple(f"{number + 1:064x}" for number in range(count))
    stored = store.put_samples(
        "random", SampleTable(keys=keys, digests=digests, splits=("all",) * count), source="none"
    )
    recipe = Recipe(
        model="none",
        weights_digest="0" * 64,
        technique="basic",
        parameters={},
        timestep=50,
        height_px=_GRID[0],
        width_px=_GRID[1],
    )
    layers = {name: (max(1, channels // config.shrink), high, wide) for name, (channels, high, wide) in _LAYERS.items()}
    run = stored.create_run(recipe, layers, batch_size=1, provenance={})
    rng = np.random.default_rng(config.seed)
    for block in range(run.n_blocks):
        rows = list(run.block_rows(block))
        maps = {name: rng.random((len(rows), *shape), np.float32).astype(np.float16) for name, shape in layers.items()}
        run.write_block(block, rows, maps)
    store.finish([run])
    readers = {name: run.reader(name) for name in layers}
    return Gathering(runs=(readers,), beside={}, size=_GRID), run.block_length

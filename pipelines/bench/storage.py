"""The store beside other ways to keep maps: writing, and reading what was just written, so from memory.

Every engine is measured in turn with ``.npy`` files, a file an image, and its ratio is the median over the pairs. A
read keeps its results until all reads of that turn are done, so that both sides fill fresh memory.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import featstore.store
from featstore.pipelines.bench import engines
from featstore.pipelines.bench.config import BenchConfig
from featstore.pipelines.bench.engines import Engine, Maps
from featstore.pipelines.bench.timing import in_turn
from featstore.pipelines.extract import execute
from featstore.pipelines.plan import ExtractConfig, make_plan
from featstore.pipelines.progress import Progress, Silent
from featstore.store import layout

SD15_SHAPES = {"1280x16x16": (1280, 16, 16), "640x32x32": (640, 32, 32), "320x64x64": (320, 64, 64)}
"""(C, H, W) of maps at the three finer levels of Stable Diffusion 1.5 at 512 px."""
OPERATIONS = {
    "write": "write",
    "write_fsync": "write, fsync",
    "single": "random image",
    "batch": "random 8",
    "scan": "scan",
    "dask": "dask",
}
"""What is measured, and what it is called in tables."""

_IMAGES = 50
_SMALL_IMAGES = 64
_READS = 192
_BATCH = 8

Pairs = list[tuple[float, ...]]
"""Seconds of an engine and of ``.npy``, a pair a repeat."""


def bench_store(config: BenchConfig, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """All engines on maps of two sizes: those of Stable Diffusion 1.5, and the few kilobytes of `reference`.

    The large ones are random numbers with heavy tails (Student's t, 3 degrees of freedom), the small ones are features
    of toyhorse that the model extracts first.
    """
    progress = progress or Silent()
    kinds, missing = engines.load()
    rng = np.random.default_rng(config.seed)
    count = config.images or _IMAGES
    large = {layer: _heavy_tailed(rng, (count, *shape)) for layer, shape in SD15_SHAPES.items()}
    size_bytes = sum(maps.nbytes for maps in large.values())
    progress.note(f"up to {size_bytes * len(kinds) / 1e9:.1f} GB of temporary files in {folder.parent}")
    shapes = {
        "sd15": _measure("sd15", large, kinds, config, folder, progress),
        "reference": _measure("reference", _reference_maps(config, folder), kinds, config, folder, progress),
    }
    own = shapes["sd15"]["engines"]["featstore"]
    return {
        "megabytes": size_bytes / 1e6,
        "write_ratio": own["write_fsync"]["ratio"],
        "read_ratio": own["single"]["ratio"],
        **{f"block_through_dask_{name}": shape["dask_cost"] for name, shape in shapes.items()},
        "shapes": shapes,
        "missing": missing,
    }


def _heavy_tailed(rng: np.random.Generator, shape: tuple[int, ...]) -> Maps:
    maps = np.empty(shape, np.float16)
    for one in maps:  # In float64, all of them at once would take four times their room.
        one[...] = rng.standard_t(3, size=one.shape)
    return maps


def _reference_maps(config: BenchConfig, folder: Path) -> dict[str, Maps]:
    """Features of toyhorse under `basic`, by layer."""
    plan = make_plan(
        ExtractConfig(
            dataset="toyhorse",
            techniques="basic",
            store=str(folder / "extracted.zarr"),
            limit=config.images or _SMALL_IMAGES,
            device=config.device,
            seed=config.seed,
        )
    )
    execute(plan, Silent())
    run = featstore.store.open(plan.config.store).dataset("toyhorse").run("basic")
    return {layer: run.numpy(layer, range(len(plan.wanted))) for layer in plan.runs[0].layers}


def _measure(
    name: str,
    layers: Mapping[str, Maps],
    kinds: Mapping[str, type[Engine]],
    config: BenchConfig,
    folder: Path,
    progress: Progress,
) -> dict[str, Any]:
    """All operations of all engines on one set of maps."""
    bench = _Bench(folder, layers)
    npy = kinds[engines.REFERENCE]
    others = {engine: kind for engine, kind in kinds.items() if kind is not npy}
    reads = _reads(layers, config.seed)
    progress.start(f"measuring: store, {name}", config.repeats * len(others) * len(OPERATIONS), "pairs")
    try:
        files = bench.written(npy)
        seconds: dict[str, dict[str, Pairs]] = {}
        for engine, kind in others.items():
            pairs = seconds[engine] = {
                "write": _turns(config, progress, functools.partial(bench.write, (kind, npy), sync=False))
            }
            if kind.can_sync:
                pairs["write_fsync"] = _turns(config, progress, functools.partial(bench.write, (kind, npy), sync=True))
            one = bench.written(kind)
            for operation, read in reads.items():
                sides = [functools.partial(read, side) for side in (one, files)]
                pairs[operation] = _turns(config, progress, functools.partial(_in_turn, sides))
            if engine == "featstore":
                costs = _turns(config, Silent(), functools.partial(_in_turn, _dask_sides(one)))
            bench.remove(one)
        bench.remove(files)
    finally:
        progress.stop()
    size_bytes = sum(maps.nbytes for maps in layers.values())
    sizes = {operation: size_bytes for operation in OPERATIONS}
    singles, batches = _picks(layers, config.seed)
    sizes["single"] = sum(layers[layer][row].nbytes for layer, row in singles)
    sizes["batch"] = sum(layers[layer][row].nbytes for layer, rows in batches for row in rows)
    return {
        "megabytes": size_bytes / 1e6,
        "images": len(next(iter(layers.values()))),
        "layers": {layer: list(maps.shape[1:]) for layer, maps in layers.items()},
        "npy": {
            op: _rate(sizes[op], [npy for pairs in seconds.values() for _, npy in pairs.get(op, [])])
            for op in OPERATIONS
        },
        "engines": {
            engine: {
                "checksum": kind.checksum,
                **{op: _summary(pairs, sizes[op]) for op, pairs in seconds[engine].items()},
            }
            for engine, kind in others.items()
        },
        "dask_cost": statistics.median(task / direct for direct, task, _ in costs),
        "dask_compute_cost": statistics.median(compute / direct for direct, _, compute in costs),
    }


def _turns(config: BenchConfig, progress: Progress, measure: Callable[[int], tuple[float, ...]]) -> Pairs:
    """What ``measure`` gives for each repeat, after one that does not count.

    The first touch of memory, threads and modules is not what is asked for; memory above all, which the host of a
    virtual machine takes back when it was free for seconds, and which is then ten times as slow to come by.
    """
    measure(1)
    pairs = []
    for repeat in range(config.repeats):
        pairs.append(measure(repeat))
        progress.advance()
    return pairs


def _in_turn(sides: Sequence[Callable[[], object]], repeat: int) -> tuple[float, ...]:
    return in_turn(repeat, *sides)


class _Bench:
    """Engines in folders of their own, all with the same maps and blocks."""

    def __init__(self, folder: Path, layers: Mapping[str, Maps]) -> None:
        self._folder = folder
        self._layers = layers
        self._block = layout.block_length([(m.shape[1], m.shape[2], m.shape[3]) for m in layers.values()], 2)
        self._numbers = itertools.count()

    def _make(self, kind: type[Engine], *, sync: bool) -> Engine:
        folder = self._folder / f"engine-{next(self._numbers)}"
        folder.mkdir()
        return kind(folder, self._layers, block=self._block, sync=sync)

    def write(self, kinds: Sequence[type[Engine]], repeat: int, *, sync: bool) -> tuple[float, ...]:
        """Seconds that each of the engines takes to write everything."""
        sides = [self._make(kind, sync=sync) for kind in kinds]
        try:
            return in_turn(repeat, *(side.write for side in sides))
        finally:
            for side in sides:
                self.remove(side)

    def written(self, kind: type[Engine]) -> Engine:
        """An engine that has written everything."""
        engine = self._make(kind, sync=False)
        engine.write()
        return engine

    def remove(self, engine: Engine) -> None:
        """Close it and delete its files."""
        engine.close()
        shutil.rmtree(engine.folder)


def _picks(layers: Mapping[str, Maps], seed: int) -> tuple[list[tuple[str, int]], list[tuple[str, list[int]]]]:
    """Random images of random layers, none twice, one by one and in batches of one layer each."""
    rng = np.random.default_rng(seed + 1)
    count = len(next(iter(layers.values())))
    orders = {layer: rng.permutation(count).tolist() for layer in layers}
    singles = [(layer, row) for layer, order in orders.items() for row in order]
    rng.shuffle(singles)
    batches = [
        (layer, order[first : first + _BATCH]) for layer, order in orders.items() for first in range(0, count, _BATCH)
    ]
    rng.shuffle(batches)
    return [(layer, int(row)) for layer, row in singles[:_READS]], batches[: _READS // _BATCH]


def _reads(layers: Mapping[str, Maps], seed: int) -> dict[str, Callable[[Engine], object]]:
    """The ways to read, by operation."""
    singles, batches = _picks(layers, seed)
    return {
        "single": lambda engine: [engine.single(layer, row) for layer, row in singles],
        "batch": lambda engine: [engine.batch(layer, rows) for layer, rows in batches],
        "scan": lambda engine: engine.scan(),
        "dask": lambda engine: [_consumed(engine.lazy(layer)) for layer in layers],
    }


def _consumed(lazy: Any) -> Any:
    """A value a map of a lazy array, computed by tasks that follow those that read."""
    # Not by `drop_axis`, for which dask joins all chunks along an axis first, and copies where there is but one.
    chunks = (lazy.chunks[0], (1,), (1,), (1,))
    return lazy.map_blocks(lambda block: block[:, :1, :1, :1], chunks=chunks).compute(scheduler="synchronous")


def _dask_sides(engine: Engine) -> list[Callable[[], object]]:
    """Ways to read all blocks: directly, by tasks that go on with a block where it is, and by computing each.

    What ``compute`` returns is a copy that dask makes of every block.
    """

    def blocks(read: Callable[[str, int], object]) -> Callable[[], None]:
        def call() -> None:
            for layer, block in itertools.product(engine.layers, range(engine.n_blocks)):
                read(layer, block)

        return call

    lazy = {layer: engine.lazy(layer) for layer in engine.layers}
    return [
        blocks(engine.read_block),
        lambda: [_consumed(array) for array in lazy.values()],
        blocks(lambda layer, block: lazy[layer].blocks[block].compute(scheduler="synchronous")),
    ]


def _rate(size_bytes: int, seconds: Sequence[float]) -> float:
    """Megabytes a second, by the median."""
    return size_bytes / 1e6 / statistics.median(seconds)


def _summary(pairs: Pairs, size_bytes: int) -> dict[str, Any]:
    """Rates of an engine and of ``.npy``, and the ratio of the two."""
    ratios = [npy / ours for ours, npy in pairs]
    return {
        "megabytes_per_second": _rate(size_bytes, [ours for ours, _ in pairs]),
        "npy_megabytes_per_second": _rate(size_bytes, [npy for _, npy in pairs]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def tables(figures: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], list[list[str]]]]:
    """What `bench_store` measured as tables: a title, column heads, rows of texts."""
    for name, shape in figures["shapes"].items():
        title = f"store, {name}: {shape['images']} images of {len(shape['layers'])} layers, MB/s (times .npy)"
        rows = [[engines.REFERENCE, "none", *(f"{shape['npy'][operation]:,.0f}" for operation in OPERATIONS)]]
        for engine, found in shape["engines"].items():
            cells = [found.get(operation) for operation in OPERATIONS]
            rows.append([engine, found["checksum"], *(_cell(cell) for cell in cells)])
        rows += [[engine, reason, *("-" for _ in OPERATIONS)] for engine, reason in figures["missing"].items()]
        yield title, ["", "checksum", *OPERATIONS.values()], rows


def _cell(cell: Mapping[str, Any] | None) -> str:
    return "-" if cell is None else f"{cell['megabytes_per_second']:,.0f} ({cell['ratio']:.2f})"

"""Heads on random features of the size of Stable Diffusion 1.5's: speed and memory beside the common way.

Each side runs in a process of its own, so that the largest resident set is that of one of them.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from featstore.pipelines.memory import peak_rss_bytes, rss_bytes

LAYERS = {
    "up-level0-upsampler-out": (1280, 16, 16),
    "up-level1-upsampler-out": (1280, 32, 32),
    "up-level2-upsampler-out": (640, 64, 64),
    "up-level3-repeat2-vit-out": (320, 64, 64),
}
ATTENTION = {"attn-up-cross-4": (77, 16, 16), "attn-up-cross-2": (77, 32, 32)}
SIDE_PX = 256
CLASSES = 21
RUNS = 4
MEMBERS = 10
IMAGES = 30
STEPS = 500

_COMMON_IMAGES = 1


def measure(
    *, images: int = IMAGES, steps: int = STEPS, members: int = MEMBERS, shrink: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Both comparisons.

    Args:
        images: training images of the large task, which the common way is computed for and not run.
        steps: steps of each member.
        members: of the ensemble.
        shrink: divides channels, for a quick look.
        seed: of the features.

    Returns:
        ``small``: both sides on what both can hold; ``large``: ours, and what the common way would take.
    """
    job = functools.partial(_in_process, steps=steps, members=members, shrink=shrink, seed=seed)
    common = job(_common, images=_COMMON_IMAGES)
    ours = job(_ours, images=_COMMON_IMAGES)
    large = job(_ours, images=images)
    vector = RUNS * sum(c // shrink for c, _, _ in LAYERS.values()) + sum(c for c, _, _ in ATTENTION.values())
    pixels = SIDE_PX * SIDE_PX
    return {
        "small": {
            "images": _COMMON_IMAGES,
            "steps": steps,
            "members": members,
            "common_way": common,
            "featstore": ours,
            "times_the_pixels_a_second": ours["pixels_a_second"] / common["pixels_a_second"],
            "times_the_steady_rate": ours["steady_pixels_a_second"] / common["steady_pixels_a_second"],
            "memory_ratio": common["more_megabytes"] / ours["more_megabytes"],
        },
        "large": {
            "images": images,
            **large,
            "seconds_an_epoch": images * pixels * members / large["steady_pixels_a_second"],
            "common_way_megabytes": vector * images * pixels * 4 / 1e6,
        },
    }


def _in_process(side: Callable[..., Mapping[str, float]], **arguments: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, side, arguments).result()


def _measured(side: Callable[..., Mapping[str, float]], arguments: Mapping[str, int]) -> dict[str, float]:
    found = dict(side(**arguments))
    whole = found["prepare_seconds"] + found["train_seconds"]
    peak = peak_rss_bytes()
    return {
        "prepare_seconds": found["prepare_seconds"],
        "train_seconds": found["train_seconds"],
        "pixels_a_second": found["pixels"] / whole,
        "steady_pixels_a_second": found["pixels"] / found["train_seconds"],
        "peak_megabytes": peak / 1e6,
        "more_megabytes": (peak - found["before_bytes"]) / 1e6,
    }


def _maps(shape: tuple[int, int, int], images: int, *key: int) -> np.ndarray:
    """(images, C, H, W) float16, random."""
    return np.random.default_rng(key).standard_normal((images, *shape), dtype=np.float32).astype(np.float16)


def _shapes(shrink: int) -> dict[str, tuple[int, int, int]]:
    return {name: (c // shrink, h, w) for name, (c, h, w) in LAYERS.items()}


def _masks(images: int, seed: int) -> np.ndarray:
    """Labels in squares of 32 px, so that no class is too small to count."""
    squares = np.random.default_rng([seed, 7]).integers(0, CLASSES, (images, SIDE_PX // 32, SIDE_PX // 32))
    return np.kron(squares, np.ones((1, 32, 32))).astype(np.uint8)


def _common(*, images: int, steps: int, members: int, shrink: int, seed: int) -> dict[str, float]:
    from featstore.pipelines.bench import head_common_way

    shapes = _shapes(shrink)
    bucket = [
        {name: _maps(shape, images, seed, run, n) for n, (name, shape) in enumerate(shapes.items())}
        for run in range(RUNS)
    ]
    beside = {name: _maps(shape, images, seed, 9, n) for n, (name, shape) in enumerate(ATTENTION.items())}
    masks = _masks(images, seed)
    before = rss_bytes()
    found = head_common_way.train(bucket, beside, masks, members=members, steps=steps, classes=CLASSES)
    return {
        "prepare_seconds": found.prepare_seconds,
        "train_seconds": found.train_seconds,
        "pixels": float(found.pixels),
        "before_bytes": float(before),
    }


def _ours(*, images: int, steps: int, members: int, shrink: int, seed: int) -> dict[str, float]:
    from featstore.heads import Beside, Features, PixelHeadConfig, RunRef, SegmentationTask, train_segmentation

    bucket = [
        {name: _lazy(shape, images, seed, run, n) for n, (name, shape) in enumerate(_shapes(shrink).items())}
        for run in range(RUNS)
    ]
    beside = {name: _lazy(shape, images, seed, 9, n) for n, (name, shape) in enumerate(ATTENTION.items())}
    task = SegmentationTask(
        features=Features(maps=bucket, beside=[Beside(run=RunRef(name="attention"), layers=beside)]),
        masks=_masks(images, seed),
        train_rows=range(images),
        test_rows=[],
        classes=[str(number) for number in range(CLASSES)],
    )
    before = rss_bytes()
    begun = time.perf_counter()
    first: list[float] = []
    config = PixelHeadConfig(members=members, assigners=2, max_steps=steps, free_epochs=100)
    train_segmentation(task, config, progress=lambda done, most: first.append(time.perf_counter()))
    end = time.perf_counter()
    # What lies before the first sign of progress is reading and standardising, and the steps until then.
    train = (end - first[0]) * len(first) / max(1, len(first) - 1) if len(first) > 1 else end - begun
    return {
        "prepare_seconds": max(0.0, end - begun - train),
        "train_seconds": min(train, end - begun),
        "pixels": float(64 * steps * members),
        "before_bytes": float(before),
    }


def _lazy(shape: tuple[int, int, int], images: int, *key: int) -> Any:
    """A lazy array of random maps, an image a block, made when it is read: it holds no memory before."""
    import dask.array as da

    def block(block_info: Any = None) -> np.ndarray:
        return _maps(shape, 1, *key, block_info[None]["chunk-location"][0])

    chunks = ((1,) * images, *((side,) for side in shape))
    return da.map_blocks(block, dtype=np.float16, chunks=chunks, meta=np.empty((0,) * 4, np.float16))

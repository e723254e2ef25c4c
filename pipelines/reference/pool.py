"""Renders the pretraining stream once, into memory-mapped arrays that all stages share.

Workers write disjoint rows; a chunk's caption file is written last, by rename, and says that the chunk
is complete. Rerunning renders only what is missing.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from featstore.datasets import toyhorse
from featstore.pipelines.reference.captions import level_of
from featstore.whole_file import write_whole

logger = logging.getLogger(__name__)

CHUNK_IMAGES = 512
EDGE_LOW, EDGE_HIGH = 100, 200
"""Canny's thresholds."""

U8 = npt.NDArray[np.uint8]


def edges_of(image: U8) -> U8:
    """Canny edges of an RGB image (H, W, 3) uint8: (H, W) uint8, 0 or 255."""
    return np.asarray(cv2.Canny(np.ascontiguousarray(image), EDGE_LOW, EDGE_HIGH), dtype=np.uint8)


def _layout(images: int) -> dict[str, tuple[tuple[int, ...], str]]:
    side = toyhorse.IMAGE_SIZE_PX
    return {
        "images": ((images, side, side, 3), "uint8"),
        "parts": ((images, side, side), "uint8"),
        "edges": ((images, side, side // 8), "uint8"),
        "labels": ((images, 3), "int16"),
    }


def render_chunk(folder: Path, start: int, stop: int, seed: int) -> int:
    """Render the pictures ``start`` to ``stop`` of the stream into the arrays of ``folder``."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in _layout(1)}
    captions = []
    for index in range(start, stop):
        picture = toyhorse.render_stream(index, seed=seed)
        level = level_of(index, seed=seed)
        image = picture.image
        if level:
            image = toyhorse.degrade(image, np.random.default_rng((seed, index, 11)), level)
        arrays["images"][index] = image
        arrays["parts"][index] = picture.parts
        arrays["edges"][index] = np.packbits(edges_of(image) > 0, axis=-1)
        coat, background = (
            list(toyhorse.COATS).index(picture.coat),
            list(toyhorse.BACKGROUNDS).index(picture.background),
        )
        arrays["labels"][index] = (level, coat, background)
        captions.append([picture.caption, picture.fine_caption])
    del arrays
    write_whole(_done_file(folder, start), json.dumps(captions).encode(), durable=False)
    return stop - start


def _done_file(folder: Path, start: int) -> Path:
    return folder / f"captions-{start:08d}.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """The rendered pictures; every array is memory-mapped and read-only."""

    images: U8
    """(N, 64, 64, 3) RGB."""
    parts: U8
    """(N, 64, 64) part labels."""
    edges: U8
    """(N, 64, 8) Canny edges, eight pixels a byte."""
    labels: npt.NDArray[np.int16]
    """(N, 3) quality level, index of the coat, index of the background."""
    captions: list[list[str]]
    """[plain, detailed] of every picture."""


class PoolRender:
    """A rendering that runs in processes of its own while the caller trains on what is there."""

    def __init__(self, folder: Path, *, images: int, seed: int, workers: int) -> None:
        self._folder, self._images = folder, images
        folder.mkdir(parents=True, exist_ok=True)
        self._prepare(seed)
        starts = [s for s in range(0, images, CHUNK_IMAGES) if not _done_file(folder, s).exists()]
        self._executor: ProcessPoolExecutor | None = None
        self._futures: dict[int, Future[int]] = {}
        if starts:
            logger.info("pool: rendering %d chunks of %d images, %d workers", len(starts), CHUNK_IMAGES, workers)
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(workers, mp_context=context)
            self._futures = {
                start: self._executor.submit(render_chunk, folder, start, min(start + CHUNK_IMAGES, images), seed)
                for start in starts
            }

    def _prepare(self, seed: int) -> None:
        facts = {"images": self._images, "seed": seed, "format": 1}
        note = self._folder / "pool.json"
        if note.exists() and json.loads(note.read_text(encoding="utf-8")) == facts:
            return
        for stale in self._folder.glob("captions-*.json"):
            stale.unlink()
        for name, (shape, dtype) in _layout(self._images).items():
            np.lib.format.open_memmap(self._folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape).flush()
        note.write_text(json.dumps(facts), encoding="utf-8")

    def wait(self, images: int | None = None) -> Pool:
        """The first ``images`` pictures (all by default), once they are rendered."""
        wanted = self._images if images is None else images
        began, told = time.monotonic(), time.monotonic()
        for start, future in self._futures.items():
            if start < wanted:
                future.result()
                if time.monotonic() - told > 15:
                    told = time.monotonic()
                    logger.info("pool: %d of %d images", start + CHUNK_IMAGES, wanted)
        logger.info("pool: %d images ready, waited %.0f s", wanted, time.monotonic() - began)
        return self._open(wanted)

    def _open(self, images: int) -> Pool:
        arrays = {name: np.load(self._folder / f"{name}.npy", mmap_mode="r")[:images] for name in _layout(1)}
        captions: list[list[str]] = []
        for start in range(0, images, CHUNK_IMAGES):
            captions += json.loads(_done_file(self._folder, start).read_text(encoding="utf-8"))
        return Pool(**arrays, captions=captions[:images])

    def close(self) -> None:
        """Stop rendering; what is complete stays."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


TRAIN, VALIDATION, TEST = range(30), range(30, 60), range(60, 160)
"""Indices of the data set's splits."""


def split_pictures(indices: range) -> list[toyhorse.Picture]:
    """The pictures of the data set at ``indices``."""
    return [toyhorse.render_split(index) for index in indices]

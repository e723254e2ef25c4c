"""Images of the blocks to come, decoded and resized in threads while the device computes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np

from featstore.datasets import UnreadableImageError
from featstore.pipelines.outcome import RunOutcome
from featstore.pipelines.plan import Plan

_MAX_THREADS = 16


@dataclasses.dataclass(frozen=True, slots=True)
class BlockImages:
    """The images of one block that at least one run needs."""

    block: int
    """Index of the block."""
    wanted: np.ndarray
    """Positions in ``plan.wanted`` (n,), in the order of their rows."""
    pixels: np.ndarray
    """uint8 (n, height, width, 3), RGB."""
    failed: Mapping[int, str]
    """Positions that could not be read, with the reason."""


class ImageReader:
    """Reads blocks of images one block ahead of who iterates, an image a task.

    At most two blocks of decoded images are held: the one that is computed and the next.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), thread_name_prefix="featstore-read")

    def blocks(self, group: Sequence[RunOutcome]) -> Iterator[BlockImages]:
        """Blocks in which a run of ``group``, runs of one block length and image size, has something to do."""
        rows = group[0].rows
        todo = np.logical_or.reduce([outcome.planned.todo for outcome in group])
        order = np.argsort(rows, kind="stable")
        order = order[todo[order]]
        blocks = rows[order] // group[0].run.block_length
        recipe = group[0].planned.recipe
        size = (recipe.height_px, recipe.width_px)
        ahead: tuple[int, list[int], list[Future[np.ndarray]]] | None = None
        for block in [*np.unique(blocks).tolist(), None]:
            current = ahead
            if block is not None:
                positions = order[blocks == block].tolist()
                ahead = block, positions, [self._pool.submit(self._read, one, size) for one in positions]
            if current is not None:
                yield self._gathered(*current, size)

    def _gathered(
        self, block: int, positions: Sequence[int], reads: Sequence[Future[np.ndarray]], size: tuple[int, int]
    ) -> BlockImages:
        pixels, good, failed = [], [], {}
        for position, read in zip(positions, reads, strict=True):
            try:
                pixels.append(read.result())
                good.append(position)
            except UnreadableImageError as error:
                failed[position] = str(error)
        stacked = np.stack(pixels) if pixels else np.zeros((0, *size, 3), np.uint8)
        return BlockImages(block, np.array(good, dtype=int), stacked, failed)

    def _read(self, position: int, size: tuple[int, int]) -> np.ndarray:
        # Imported in the thread: planning does without torch, which this module's package brings.
        from featstore.extraction.images import prepare

        dataset = self._plan.dataset
        return prepare(dataset.image(dataset.samples[self._plan.wanted[position]].key), *size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

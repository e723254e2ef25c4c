"""Blocks to come: claimed, their images decoded and resized in threads, while the device computes."""

from __future__ import annotations

import dataclasses
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np

from featstore.datasets import UnreadableImageError
from featstore.pipelines.claims import Claims, Share, Work
from featstore.pipelines.plan import Plan

_MAX_THREADS = 16
_CLAIMED_AHEAD = 2
"""Blocks that are claimed before the current one is done: one whose images are read, one for the time until then."""


@dataclasses.dataclass(frozen=True, slots=True)
class BlockImages:
    """The images of one block that at least one run needs."""

    block: int
    """Index of the block."""
    shares: Sequence[Share]
    """What is ours of it."""
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
        recipe = plan.runs[0].recipe
        self._size = (recipe.height_px, recipe.width_px)
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), thread_name_prefix="featstore-read")
        self._claimer = ThreadPoolExecutor(1, thread_name_prefix="featstore-claim")

    def blocks(self, work: Sequence[Work], claims: Claims) -> Iterator[BlockImages]:
        """The blocks of ``work`` of which something is ours, one after the other."""
        to_claim = iter(work)
        claimed: deque[tuple[int, Future[list[Share]]]] = deque()

        def claim() -> None:
            if (one := next(to_claim, None)) is not None:
                claimed.append((one.block, self._claimer.submit(claims.take, one)))

        for _ in range(_CLAIMED_AHEAD):
            claim()
        ahead: tuple[int, list[Share], list[int], list[Future[np.ndarray]]] | None = None
        while claimed or ahead is not None:
            current, ahead = ahead, None
            if claimed:
                block, future = claimed.popleft()
                shares = future.result()
                claim()
                if shares:
                    ahead = block, shares, *self._reads(shares)
            if current is not None:
                yield self._gathered(*current)

    def _reads(self, shares: Sequence[Share]) -> tuple[list[int], list[Future[np.ndarray]]]:
        """The images of all shares, in the order of their rows, and what reads them."""
        positions = np.unique(np.concatenate([share.positions for share in shares]))
        positions = positions[np.argsort(shares[0].outcome.rows[positions], kind="stable")]
        return positions.tolist(), [self._pool.submit(self._read, position) for position in positions.tolist()]

    def _gathered(
        self, block: int, shares: Sequence[Share], positions: Sequence[int], reads: Sequence[Future[np.ndarray]]
    ) -> BlockImages:
        pixels, good, failed = [], [], {}
        for position, read in zip(positions, reads, strict=True):
            try:
                pixels.append(read.result())
                good.append(position)
            except UnreadableImageError as error:
                failed[position] = str(error)
        stacked = np.stack(pixels) if pixels else np.zeros((0, *self._size, 3), np.uint8)
        return BlockImages(block, shares, np.array(good, dtype=int), stacked, failed)

    def _read(self, position: int) -> np.ndarray:
        # Imported in the thread: planning does without torch, which this module's package brings.
        from featstore.extraction.images import prepare

        dataset = self._plan.dataset
        return prepare(dataset.image(dataset.samples[self._plan.wanted[position]].key), *self._size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._claimer.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)

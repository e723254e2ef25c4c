"""The one batch size of a new run's forward passes: chosen once, before its first block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from featstore.models import ModelSource

if TYPE_CHECKING:
    import torch

    from featstore.models.backbones.base import Backbone
    from featstore.pipelines.plan import PlannedRun

MAX_BATCH_SIZE = 64
_CPU_BATCH_SIZE = 16
_CPU_BATCH_POSITIONS = 16 * 64 * 64
"""Latent positions of a batch on a CPU at most: 16 images of 512 px, 4 of 1024 px."""
_DEVICE_SHARE = 0.8
"""Share of a GPU's free memory that a batch may take; the rest is for its allocator's gaps and for others."""


def cpu_batch_size(source: ModelSource, height_px: int, width_px: int) -> int:
    """Batch size on a CPU, whose caches and not whose memory set the limit: 16, less for large images.

    It depends on nothing of the machine, so that two machines give the same bytes.
    """
    positions = (height_px // source.latent_factor) * (width_px // source.latent_factor)
    return power_of_two(max(1, min(_CPU_BATCH_SIZE, _CPU_BATCH_POSITIONS // positions)))


def probed_batch_size(run: Callable[[int], None], device: torch.device) -> int:
    """The largest power of two, 64 at most, of which a batch fits into the GPU's free memory.

    Measured on batches of one and two rows: what the second row adds is what each row takes.

    Args:
        run: runs everything that a batch of so many rows runs.
        device: a CUDA device.
    """
    import torch

    peaks = []
    for rows in (1, 2):
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run(rows)
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device))
    free, _ = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device)
    return fitting(peaks[0], peaks[1], int(room * _DEVICE_SHARE))


def probed_batch_size_of(runs: Sequence[PlannedRun], model: Backbone) -> int:
    """`probed_batch_size` of all passes of some runs, which are of one size and precision."""
    from featstore.pipelines.compute import extractor_of

    size = (runs[0].recipe.height_px, runs[0].recipe.width_px)

    def run(rows: int) -> None:
        extractor = extractor_of(model, runs, rows)
        images = np.zeros((rows, *size, 3), np.uint8)
        latents = extractor.encode(images)
        for index, planned in enumerate(runs):
            extractor.run(
                index,
                latents,
                images,
                ["0" * 64] * rows,
                planned.recipe.timestep,
                planned.recipe.seed,
                [""] * rows,
                denoise_from=planned.recipe.denoise_from,
            )

    return probed_batch_size(run, model.device)


def fitting(one_bytes: int, two_bytes: int, room_bytes: int) -> int:
    """The largest power of two, 64 at most and 1 at least, of rows that fit.

    Args:
        one_bytes: peak of a batch of one row.
        two_bytes: peak of a batch of two rows.
        room_bytes: what may be taken.
    """
    row_bytes = max(1, two_bytes - one_bytes)
    rows = 1 + max(0, room_bytes - one_bytes) // row_bytes
    return power_of_two(min(rows, MAX_BATCH_SIZE))


def power_of_two(rows: int) -> int:
    """The largest power of two that is not above ``rows``, which is 1 or more."""
    return 1 << (rows.bit_length() - 1)

"""Blocks whose passes are slept through: what a worker of a simulated cluster does. Nothing here imports torch.

All else is what an extraction does: the task is a `Block` with keys and digests of its images, a lease is taken, and
real maps go through the store's writer and are committed. A block's maps have a thousandth of the bytes of 25 images'
`practical` layers of Stable Diffusion 1.5, which are what fills 64 MiB of the largest layer.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Iterator

import numpy as np

import featstore.store
from featstore.pipelines.cluster.job import Block, Images
from featstore.recipe import Recipe
from featstore.store import Run, SampleTable
from featstore.store.leases import Holder, Keeper, acquire
from featstore.store.local import LocalObjects

LAYERS = {"up1-q": (8, 4, 4), "up1-out": (8, 4, 4), "up2-q": (4, 8, 8), "up3-k": (2, 16, 16)}
"""Shapes (C, H, W): those of 1280x16x16 twice, 640x32x32 and 320x64x64, channels by 160, sides by 4."""
IMAGES_A_BLOCK = 64
_DATASET = "simulated"
_SEED = 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What all blocks have in common."""

    store: str
    run: str
    """Path of the run in the store."""
    seconds: float
    """For which a block's passes are slept through."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a worker says of a block."""

    process: int
    torch: bool
    """Whether its process has imported torch."""
    store_seconds: float
    """For the leases and the writing."""
    bytes: int


def make_store(folder: str, blocks: int) -> Run:
    """A store with one empty run of so many blocks; objects are not synced, as it is not the disk that is measured."""
    store = featstore.store.create(folder)
    _unsynced(store.objects)
    count = blocks * IMAGES_A_BLOCK
    keys = tuple(f"train/image-{number:09d}.jpg" for number in range(count))
    digests = tuple(f"{number + 1:064x}" for number in range(count))
    table = SampleTable(keys=keys, digests=digests, splits=("all",) * count)
    stored = store.put_samples(_DATASET, table, source="made up")
    recipe = Recipe(
        model="none",
        weights_digest="0" * 64,
        technique="basic",
        parameters={},
        timestep=50,
        height_px=512,
        width_px=512,
    )
    run = stored.create_run(recipe, LAYERS, batch_size=1, provenance={})
    assert run.block_length == IMAGES_A_BLOCK
    return run


def blocks(run: Run, first: int, count: int) -> Iterator[Block]:
    """Tasks for some of the store's blocks, made as they are asked for."""
    for number in range(first, first + count):
        inside = run.block_rows(number)
        keys = tuple(f"train/image-{row:09d}.jpg" for row in inside)
        yield Block(
            group=0,
            block=number,
            rows=np.array(inside),
            images=Images(keys=keys, digests=tuple(f"{row + 1:064x}" for row in inside), files=keys),
            missing={0: {layer: np.ones(len(inside), dtype=bool) for layer in LAYERS}},
        )


def compute(simulation: Simulation, block: Block) -> Done:
    """Sleep through the passes of a block, and store what they would have given."""
    run = _run(simulation.store, simulation.run)
    begin = time.perf_counter()
    with Keeper() as keeper:
        lease = acquire(run.dataset.objects, run.path, block.block)
        assert not isinstance(lease, Holder), str(lease)
        keeper.keep(lease)
        before = time.perf_counter() - begin
        time.sleep(simulation.seconds)
        begin = time.perf_counter()
        rng = np.random.default_rng((_SEED, block.block))
        rows = block.rows.tolist()
        maps = {name: rng.standard_normal((len(rows), *shape)).astype(np.float16) for name, shape in LAYERS.items()}
        written = run.write_block(block.block, rows, maps)
    after = time.perf_counter() - begin
    return Done(process=os.getpid(), torch="torch" in sys.modules, store_seconds=before + after, bytes=written)


@functools.lru_cache(maxsize=1)
def _run(store: str, path: str) -> Run:
    opened = featstore.store.create(store)
    _unsynced(opened.objects)
    return opened.dataset(_DATASET).open_run(path)


def _unsynced(objects: object) -> None:
    assert isinstance(objects, LocalObjects)
    objects.durable = False

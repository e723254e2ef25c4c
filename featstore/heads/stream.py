"""Maps of many images, read block by block in shuffled order while the last batch is being trained on.

For data sets that do not fit into memory: no more than `Stream.window_bytes` of blocks are held, whatever
the number of images. A window of blocks is drawn at random, its rows are shuffled together and leave in
batches; the next window is read by a thread meanwhile.

B images of a batch, K runs in the bucket, C channels, H W map height and width.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featstore.errors import BadRequestError
from featstore.heads.features import Features, FeaturesSpec
from featstore.heads.reading import Rows, check_finite

WINDOW_BYTES = 512 * 1024**2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Maps:
    """Maps of B images at their own sizes, as they are stored (float16 or float32)."""

    rows: npt.NDArray[np.int64]
    """(B,) rows of the arrays."""
    layers: dict[str, Tensor]
    """Layer name to (B, K, C, H, W)."""
    beside: dict[str, Tensor]
    """``RUN/LAYER`` to (B, C, H, W)."""

    def to(self, device: torch.device | str) -> Maps:
        """The same on ``device`` in float32."""
        return Maps(
            rows=self.rows,
            layers={name: value.to(device).float() for name, value in self.layers.items()},
            beside={name: value.to(device).float() for name, value in self.beside.items()},
        )

    def take(self, places: Sequence[int] | npt.NDArray[np.int64]) -> Maps:
        """Some of the images, by their places in the batch."""
        index = torch.as_tensor(np.asarray(places, np.int64))
        return Maps(
            rows=self.rows[np.asarray(places, np.int64)],
            layers={name: value[index] for name, value in self.layers.items()},
            beside={name: value[index] for name, value in self.beside.items()},
        )


def read_maps(features: Features, rows: Rows) -> Maps:
    """Maps of ``rows``, in their order; every block that holds one is read once.

    Raises:
        BadRequestError: for NaN or infinity in a row. Errors of the arrays' own tasks come through.
    """
    wanted = np.asarray(rows, np.int64)
    order = np.argsort(wanted, kind="stable")
    back = np.argsort(order, kind="stable")
    lazy = []
    whats = []
    for what, array in features.arrays():
        whats.append(what)
        lazy.append([array[part.min() : part.max() + 1] for part in _parts(array, wanted[order])])
    found = []
    for what, array, blocks in zip(whats, [a for _, a in features.arrays()], dask.compute(*lazy), strict=True):
        pieces = [
            check_finite(block[part - part.min()], part, what)
            for part, block in zip(_parts(array, wanted[order]), blocks, strict=True)
        ]
        found.append(torch.from_numpy(np.concatenate(pieces)[back]))
    count = len(features.maps)
    names = list(features.maps[0])
    runs = [dict(zip(layers, found[k * len(names) :], strict=False)) for k, layers in enumerate(features.maps)]
    beside = [f"{one.run.name}/{name}" for one in features.beside for name in one.layers]
    return Maps(
        rows=wanted,
        layers={name: torch.stack([run[name] for run in runs], 1) for name in names},
        beside=dict(zip(beside, found[count * len(names) :], strict=True)),
    )


def given_maps(
    features: FeaturesSpec,
    maps: Sequence[Mapping[str, npt.NDArray[Any] | Tensor]],
    beside: Mapping[str, npt.NDArray[Any] | Tensor] | None = None,
) -> Maps:
    """The maps that a caller holds, checked against what a head needs.

    Args:
        features: what the head needs.
        maps: for each of the K runs in ``features.runs`` order, layer name to (B, C, H, W) float16 or
            float32; further layers are ignored.
        beside: (B, C, H, W) by the names of ``features.beside_layers``.

    Raises:
        BadRequestError: if runs or layers are missing or have other shapes.
    """
    if len(maps) != len(features.runs):
        raise BadRequestError(f"the head needs the maps of {len(features.runs)} runs, not of {len(maps)}")
    first = next(iter(features.layers))
    images = len(maps[0][first]) if first in maps[0] else 0

    def checked(layers: Mapping[str, npt.NDArray[Any] | Tensor], name: str, shape: tuple[int, int, int]) -> Tensor:
        if name not in layers:
            raise BadRequestError(f"the head needs layer {name!r}; given: {', '.join(sorted(layers)) or 'none'}")
        value = torch.as_tensor(layers[name])
        if tuple(value.shape) != (images, *shape):
            raise BadRequestError(f"layer {name!r} is {tuple(value.shape)}, the head needs {(images, *shape)}")
        return value

    return Maps(
        rows=np.arange(images),
        layers={
            name: torch.stack([checked(run, name, shape) for run in maps], 1) for name, shape in features.layers.items()
        },
        beside={name: checked(beside or {}, name, shape) for name, shape in features.beside_layers.items()},
    )


def shuffled_windows(
    blocks: Sequence[npt.NDArray[np.int64]], room: int, seed: int, epoch: int
) -> list[npt.NDArray[np.int64]]:
    """Rows in block-shuffled order: blocks are drawn at random, and ``room`` of them are shuffled together.

    Args:
        blocks: rows of each block.
        room: blocks of a window.
        seed: of all epochs.
        epoch: which one.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(blocks))
    groups = [order[start : start + room] for start in range(0, len(order), room)]
    return [rng.permutation(np.concatenate([blocks[one] for one in group])) for group in groups]


def _parts(array: da.Array, ordered: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The ascending rows ``ordered``, cut where the blocks of ``array`` end."""
    ends = np.cumsum(array.chunks[0])
    block = np.searchsorted(ends, ordered, side="right")
    return [part for part in np.split(ordered, np.flatnonzero(np.diff(block)) + 1) if len(part)]


def _joined(first: Maps, second: Maps) -> Maps:
    return Maps(
        rows=np.concatenate([first.rows, second.rows]),
        layers={name: torch.cat([value, second.layers[name]]) for name, value in first.layers.items()},
        beside={name: torch.cat([value, second.beside[name]]) for name, value in first.beside.items()},
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Batches of the maps of some rows, in block-shuffled order that depends on seed and epoch only."""

    features: Features
    rows: Rows
    """Rows that are read, each once an epoch."""
    batch: int
    """Images of a batch, B; the last one of an epoch may be smaller."""
    seed: int = 0
    window_bytes: int = WINDOW_BYTES
    """Bytes of blocks in a window; two windows are held, the one in use and the one being read."""

    def __post_init__(self) -> None:
        """Refuse a batch of nothing."""
        if self.batch < 1:
            raise BadRequestError(f"a batch of {self.batch} images; 1 or more are needed")

    def windows(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Rows of each window of an epoch, in the order in which they leave."""
        first = next(iter(self.features.maps[0].values()))
        blocks = _parts(first, np.unique(np.asarray(self.rows, np.int64)))
        row_bytes = sum(int(np.prod(a.shape[1:])) * a.dtype.itemsize for _, a in self.features.arrays())
        room = max(1, self.window_bytes // max(1, row_bytes * max(first.chunks[0])))
        return shuffled_windows(blocks, room, self.seed, epoch)

    def epoch(self, number: int) -> Iterator[Maps]:
        """The batches of an epoch.

        Raises:
            FeatstoreError: what reading raises, when the batch is asked for.
        """
        windows = self.windows(number)
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="featstore-stream") as reader:
            waiting = reader.submit(read_maps, self.features, windows[0]) if windows else None
            left: Maps | None = None
            for place in range(len(windows)):
                assert waiting is not None
                maps = waiting.result()
                more = windows[place + 1] if place + 1 < len(windows) else None
                waiting = None if more is None else reader.submit(read_maps, self.features, more)
                maps = maps if left is None else _joined(left, maps)
                whole = len(maps.rows) if more is None else len(maps.rows) // self.batch * self.batch
                for start in range(0, whole, self.batch):
                    yield maps.take(np.arange(start, min(start + self.batch, whole)))
                left = maps.take(np.arange(whole, len(maps.rows)))

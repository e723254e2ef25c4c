"""Maps of pairs of images, in an order in which the blocks that are held are used as often as they can be.

A pair needs two images, which may lie in any two blocks of the arrays. Read pair by pair, a block would
be read once for each of its pairs. Here pairs are grouped by their two blocks; a bounded number of blocks
is held, all pairs among them are given, and the next block is the one that has most pairs with those held.

N images, B images of a batch.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from featstore.heads.features import Features
from featstore.heads.stream import WINDOW_BYTES, Maps, read_maps

Pairs = npt.NDArray[np.int64]
"""(n, 2) rows: source and target."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One block is read, and the pairs follow that it completes."""

    block: int
    """The block to read."""
    drop: int | None
    """The block that makes room for it; None: there is room."""
    pairs: npt.NDArray[np.int64]
    """Numbers of pairs all of whose blocks are held now, shuffled."""


def visits(blocks: npt.NDArray[np.int64], room: int, rng: np.random.Generator) -> list[Visit]:
    """An order of reading.

    Args:
        blocks: (n, 2) the two blocks of each pair.
        room: blocks that are held at most, 2 or more.
        rng: decides between equals, and shuffles the pairs of a visit.
    """
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, (a, b) in enumerate(np.sort(blocks, 1).tolist()):
        cells[a, b].append(number)
    near: dict[int, set[int]] = defaultdict(set)
    """What is still to be met by each block, itself among it."""
    for a, b in cells:
        near[a].add(b)
        near[b].add(a)
    names = sorted(near)
    rank = dict(zip(names, rng.permutation(len(names)).tolist(), strict=True))
    held: list[int] = []
    out = []
    while cells:
        fresh = [name for name in names if near[name] and name not in held]
        # never empty: what only needs blocks that are held was given when the last of them came
        block = max(fresh, key=lambda name: (len(near[name].intersection([*held, name])), rank[name]))
        drop = None
        if len(held) >= room:
            # a block that has no pair with the new one goes first, then the one with the fewest blocks to meet
            drop = min(held, key=lambda name: (block in near[name], len(near[name]), rank[name]))
            held.remove(drop)
        held.append(block)
        here: list[int] = []
        for other in sorted(near[block].intersection(held)):
            here += cells.pop((min(block, other), max(block, other)))
            near[block].discard(other)
            near[other].discard(block)
        out.append(Visit(block=block, drop=drop, pairs=rng.permutation(np.array(here, np.int64))))
    return out


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PairReader:
    """Reads the maps of pairs; the order depends on pairs, arrays and the generator only."""

    features: Features
    window_bytes: int = WINDOW_BYTES
    """Bytes of maps that are held, those read ahead included; two blocks and the one read ahead at the least."""

    def order(self, pairs: Pairs, rng: np.random.Generator) -> list[Visit]:
        """The order in which `read` gives these pairs."""
        blocks = self._blocks(pairs)
        return visits(blocks, self._room(pairs, blocks), rng)

    def read(self, pairs: Pairs, order: Sequence[Visit]) -> Iterator[tuple[Visit, Held]]:
        """Read block by block, the next one while the pairs of the last one are in use.

        Args:
            pairs: (n, 2) rows.
            order: of these pairs.

        Yields:
            A visit and the maps of all blocks that are held, until the next visit is asked for.

        Raises:
            FeatstoreError: what reading raises, when the visit is asked for.
        """
        blocks = self._blocks(pairs)
        rows = {block: np.unique(pairs[blocks == block]) for block in {visit.block for visit in order}}
        held: dict[int, Maps] = {}
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="featstore-pairs") as reader:
            waiting = reader.submit(read_maps, self.features, rows[order[0].block]) if order else None
            for number, visit in enumerate(order):
                assert waiting is not None
                if visit.drop is not None:
                    del held[visit.drop]
                held[visit.block] = waiting.result()
                if number + 1 < len(order):
                    waiting = reader.submit(read_maps, self.features, rows[order[number + 1].block])
                yield visit, Held(held)

    def _blocks(self, pairs: Pairs) -> npt.NDArray[np.int64]:
        first = next(iter(self.features.maps[0].values()))
        return np.searchsorted(np.cumsum(first.chunks[0]), pairs, side="right").astype(np.int64)

    def _room(self, pairs: Pairs, blocks: npt.NDArray[np.int64]) -> int:
        row_bytes = sum(int(np.prod(a.shape[1:])) * a.dtype.itemsize for _, a in self.features.arrays())
        # only the rows that the pairs need are held
        rows, where = np.unique(pairs, return_index=True)
        most = int(np.unique(blocks.reshape(-1)[where], return_counts=True)[1].max(initial=1)) if len(rows) else 1
        return max(2, int(self.window_bytes // max(1, row_bytes * most) - 1))


class Held:
    """Maps of single rows out of the blocks that are held."""

    def __init__(self, blocks: dict[int, Maps]) -> None:
        self._places = {
            int(row): (maps, place) for maps in blocks.values() for place, row in enumerate(maps.rows.tolist())
        }

    def maps(self, *rows: int) -> Maps:
        """Maps of these rows, as they are stored."""
        parts = [(maps, place) for maps, place in (self._places[int(row)] for row in rows)]
        first = parts[0][0]
        return Maps(
            rows=np.array(rows, np.int64),
            layers={name: torch.stack([maps.layers[name][place] for maps, place in parts]) for name in first.layers},
            beside={name: torch.stack([maps.beside[name][place] for maps, place in parts]) for name in first.beside},
        )

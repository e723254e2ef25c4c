"""Reading one layer: positioned reads of a block's shard, checked, and the same behind dask tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError, CorruptError, FeatstoreError, NotCommittedError, NotFoundError
from featstore.recipe import Recipe
from featstore.store import layout, shard
from featstore.store.committed import REMEDY, Record, read_record
from featstore.store.objects import Objects

if TYPE_CHECKING:
    import dask.array

_NAMED_KEYS = 3

Rows = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerReader:
    """Everything that reading a layer needs; small enough to travel to a worker (N x 8 bytes)."""

    objects: Objects
    """Where the store lies."""
    path: str
    """Path of the run below the store."""
    dataset: str
    """Name of the data set, for messages."""
    recipe: Recipe
    """Recipe of the run, for messages."""
    layer: str
    """Name of the layer."""
    shape: layout.Shape
    """(C, H, W) of a map."""
    dtype: np.dtype[Any]
    """Element type on disk and in what is returned."""
    block_length: int
    """Images in a block."""
    wanted: Record
    """(N,) digests of the images, as the sample table had them when the run was opened."""

    @property
    def n_images(self) -> int:
        """N."""
        return len(self.wanted)

    def rows(self, rows: Sequence[int] | Rows) -> npt.NDArray[Any]:
        """Maps of ``rows`` (indices into the sample table, any order), (len(rows), C, H, W).

        Raises:
            BadRequestError: for a row outside 0..N-1.
            NotCommittedError: for rows that are absent or stale.
            CorruptError: for bytes that do not match their checksum.
        """
        wanted_rows = check_rows(rows, self.n_images)
        out = np.empty((len(wanted_rows), *self.shape), dtype=self.dtype)
        blocks = wanted_rows // self.block_length
        for block in dict.fromkeys(blocks.tolist()):
            places = np.flatnonzero(blocks == block)
            slots = wanted_rows[places] - block * self.block_length
            self._read(block, slots.tolist(), [out[place] for place in places])
        return out

    def block(self, block: int) -> npt.NDArray[Any]:
        """All maps of a block, (images in it, C, H, W); errors of `rows`."""
        first = block * self.block_length
        return self.rows(np.arange(first, min(first + self.block_length, self.n_images)))

    def _read(self, block: int, slots: list[int], targets: list[npt.NDArray[Any]]) -> None:
        before = self._require(block, slots)
        key = layout.shard_key(self.path, self.layer, block)
        failure: FeatstoreError | None = None
        try:
            with self.objects.open(key) as snapshot:
                index = shard.read_index(snapshot, self.block_length, targets[0].nbytes)
                wrong = shard.read_images(snapshot, index, slots, [shard.byte_view(target) for target in targets])
            if wrong:
                slot, reason = min(wrong.items())
                name = self._keys([block * self.block_length + slot])
                failure = CorruptError(f"{key} is damaged at image {name}: {reason}", hint=REMEDY)
        except NotFoundError:
            failure = CorruptError(f"{key} is gone, though the record says it is there", hint=REMEDY)
        except CorruptError as error:
            failure = CorruptError(f"{key} is damaged: {error}", hint=REMEDY)
        # A writer may have put another shard between our look at the record and our opening it. It
        # uncommits the rows that change before it does (write.py), so a record that still says the same
        # afterwards proves that the bytes are those it spoke of.
        after = self._record(block)
        if not np.array_equal(before[slots], after[slots]):
            self._require(block, slots)
            self._read(block, slots, targets)  # Gone and back again within the two looks.
        elif failure is not None:
            raise failure

    def _record(self, block: int) -> Record:
        return read_record(self.objects, self.path, self.layer, block, self.block_length)

    def _require(self, block: int, slots: list[int]) -> Record:
        """The block's record, if all of ``slots`` are valid."""
        record = self._record(block)
        first = block * self.block_length
        wanted = self.wanted[[first + slot for slot in slots]]
        if not np.array_equal(record[slots], wanted):
            self._refuse([first + s for s, w in zip(slots, wanted, strict=True) if record[s] != w], record, first)
        return record

    def _refuse(self, rows: list[int], record: Record, first: int) -> None:
        absent = [row for row in rows if record[row - first] == 0]
        kinds = [f"{len(absent)} absent"] if absent else []
        if len(absent) < len(rows):
            kinds.append(f"{len(rows) - len(absent)} stale (the image has changed)")
        raise NotCommittedError(
            f"{self.path}/{self.layer}: features of {self._keys(rows)} are not there: {', '.join(kinds)}",
            hint=f"{extract_request(self.dataset, self.recipe)} --layers {self.layer}",
        )

    def _keys(self, rows: list[int]) -> str:
        """The first few keys of ``rows``, for a message."""
        # Keys are read when there is something to say, so that tasks need not carry them.
        from featstore.store.dataset import read_samples

        table = read_samples(self.objects, self.dataset)
        names = [repr(table.keys[row]) for row in rows[:_NAMED_KEYS]]
        more = len(rows) - len(names)
        return ", ".join(names) + (f" and {more} more" if more else "")

    def dask(self, chosen: npt.NDArray[np.bool_] | None = None) -> dask.array.Array:
        """The layer as a lazy array (N, C, H, W), one block a chunk and one task a block.

        Args:
            chosen: (N,) rows that are read; the others are NaN and may be absent. None: all.

        Raises:
            BadRequestError: if ``chosen`` is no mask of N rows.
        """
        import dask.array as da
        from dask.base import tokenize

        sizes = [self.block_length] * (self.n_images // self.block_length)
        if rest := self.n_images % self.block_length:
            sizes.append(rest)
        if not sizes:
            return da.zeros((0, *self.shape), dtype=self.dtype)
        masks = []
        if chosen is not None:
            if chosen.shape != (self.n_images,) or chosen.dtype != np.bool_:
                raise BadRequestError(f"a mask of {self.n_images} rows is wanted, not {chosen.shape} {chosen.dtype}")
            masks = [da.from_array(chosen, chunks=(tuple(sizes),))[:, None, None, None]]
        token = tokenize(self.objects.url, self.path, self.layer, self.wanted, chosen)
        array: dask.array.Array = da.map_blocks(
            _read_chosen if masks else _read_chunk,
            *masks,
            reader=self,
            name=f"featstore-{self.layer}-{token}",
            chunks=(tuple(sizes), *((n,) for n in self.shape)),
            dtype=self.dtype,
            meta=np.empty((0, 0, 0, 0), dtype=self.dtype),
        )
        return array


def _read_chunk(*, reader: LayerReader, block_id: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
    """A dask task's body: one block."""
    return reader.block(block_id[0] if block_id else 0)


def _read_chosen(
    chosen: npt.NDArray[np.bool_], *, reader: LayerReader, block_id: tuple[int, ...] | None = None
) -> npt.NDArray[Any]:
    """A dask task's body: the chosen rows (images in the block, 1, 1, 1) of one block, NaN for the others."""
    here = np.flatnonzero(chosen)
    out = np.full((len(chosen), *reader.shape), np.nan, dtype=reader.dtype)
    if len(here):
        out[here] = reader.rows(here + (block_id[0] if block_id else 0) * reader.block_length)
    return out


def extract_request(dataset: str, recipe: Recipe) -> str:
    """The command line that extracts the run of ``recipe``, for hints."""
    return (
        f"featstore extract --dataset {dataset} --model {recipe.model} --techniques {recipe.technique} "
        f"--timesteps {recipe.timestep}"
    )


def check_rows(rows: Sequence[int] | Rows, n_images: int) -> Rows:
    """``rows`` as int64 indices.

    Raises:
        BadRequestError: if they are no whole numbers within 0..n_images-1.
    """
    array = np.asarray(rows)
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise BadRequestError(f"rows of type {array.dtype} and shape {array.shape}; a list of row numbers is wanted")
    outside = array[(array < 0) | (array >= n_images)]
    if outside.size:
        raise BadRequestError(f"row {int(outside[0])} is outside 0..{n_images - 1}")
    return array.astype(np.int64)

"""Reading one layer: positioned reads of a block's shard, checked, and the same behind dask tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError, CorruptError, FeatstoreError, NotCommittedError, NotFoundError
from featstore.recipe import IMPORTED, Recipe
from featstore.store import layout, packing, scales, shard
from featstore.store.committed import REMEDY, Record, view_record
from featstore.store.memory import room_for
from featstore.store.objects import Objects
from featstore.store.parallel import each
from featstore.store.precision import Quantised, Scales, StoredMaps, dequantise

if TYPE_CHECKING:
    import dask.array

_NAMED_KEYS = 3
_FEW = 32

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
    """Element type of what is returned."""
    stored_dtype: np.dtype[Any]
    """Element type on disk."""
    packed: bool
    """Whether maps lie behind zstd."""
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
        stored = self.stored(rows)
        if not isinstance(stored, Quantised):
            return stored
        out = room_for((len(stored), *self.shape), self.dtype)
        dequantise(stored, out)
        return out

    def stored(self, rows: Sequence[int] | Rows) -> StoredMaps:
        """Maps of ``rows`` as they lie on disk, which `Run.write_block` takes; errors of `rows`."""
        # A small map is read in microseconds, and what is done beside a large one finds the processor's caches full of
        # it: so lists of numbers, which cost less than arrays where there are few, and a short way for a single row.
        numbers = _row_numbers(rows, len(self.wanted))
        out = room_for((len(numbers), *self.shape), self.stored_dtype)
        scaled = self.stored_dtype.kind == layout.DTYPES["int8"].kind
        map_scales = np.empty((len(numbers), self.shape[0]), dtype=np.float32) if scaled else None
        data = shard.byte_view(out)
        if len(numbers) == 1:
            block, slot = divmod(numbers[0], self.block_length)
            self._read(block, [slot], [data], None if map_scales is None else [map_scales[0]])
        else:
            self._read_blocks(numbers, data, map_scales)
        return out if map_scales is None else Quantised(out, map_scales)

    def _read_blocks(self, numbers: Sequence[int], data: memoryview, map_scales: Scales | None) -> None:
        """Read the rows ``numbers`` into ``data``, block by block or, where they are requests, several at once."""
        places: dict[int, list[int]] = {}
        for place, row in enumerate(numbers):
            places.setdefault(row // self.block_length, []).append(place)
        size = data.nbytes // max(1, len(numbers))

        def read(block: int) -> None:
            slots = [numbers[place] - block * self.block_length for place in places[block]]
            targets = [data[place * size : (place + 1) * size] for place in places[block]]
            scale_targets = None if map_scales is None else [map_scales[place] for place in places[block]]
            self._read(block, slots, targets, scale_targets)

        each(self.objects, read, sorted(places))

    def block(self, block: int) -> npt.NDArray[Any]:
        """All maps of a block, (images in it, C, H, W); errors of `rows`."""
        first = block * self.block_length
        return self.rows(np.arange(first, min(first + self.block_length, self.n_images)))

    def _read(
        self,
        block: int,
        slots: list[int],
        targets: list[memoryview],
        scale_targets: list[Scales] | None,
        tries: int = 2,
    ) -> None:
        """Fill ``targets`` with the bytes of maps and, where they are int8, ``scale_targets`` with their scales."""
        before = self._require(block, slots)
        key = layout.shard_key(self.path, self.layer, block)
        failure: FeatstoreError | None = None
        try:
            wrong = (packing if self.packed else shard).read(self.objects, key, before, slots, targets)
            if not wrong and scale_targets is not None:
                key = layout.scales_shard_key(self.path, self.layer, block)
                seals = [shard.checksum(target) for target in targets]
                wrong = scales.read(self.objects, key, self.block_length, slots, seals, scale_targets)
            if wrong:
                slot, reason = min(wrong.items())
                name = self._keys([block * self.block_length + slot])
                failure = CorruptError(f"{key} is damaged at image {name}: {reason}", hint=REMEDY)
        except NotFoundError:
            failure = CorruptError(f"{key} is gone, though the record says it is there", hint=REMEDY)
        except CorruptError as error:
            failure = CorruptError(f"{key} is damaged: {error}", hint=REMEDY)
        if failure is None:
            return
        # What was read is what the record spoke of: a shard says itself of which images it is. What was not is damage,
        # unless a writer has put another shard since we looked at the record.
        after = self._record(block)
        if not np.array_equal(before[slots], after[slots]):
            self._require(block, slots)
        elif self.objects.doubt(key) or tries > 1:
            tries -= 1  # Rows that were gone and came back, within the two looks, fit the next time.
        else:
            raise failure
        self._read(block, slots, targets, scale_targets, tries)

    def _record(self, block: int) -> Record:
        """The block's record; the very same array as long as the same bytes are on disk."""
        return view_record(self.objects, self.path, self.layer, block, self.block_length)

    def _require(self, block: int, slots: list[int]) -> Record:
        """The block's record, if all of ``slots`` are valid."""
        record = self._record(block)
        first = block * self.block_length
        there, wanted = record.item, self.wanted.item
        if wrong := [first + slot for slot in slots if there(slot) != wanted(first + slot)]:
            self._refuse(wrong, record, first)
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
    """The command line that extracts the run of ``recipe``, or imports it, for hints."""
    if recipe.scheduler == IMPORTED:
        return (
            f"featstore import-npy FOLDER --dataset {dataset} --model {recipe.model} --technique {recipe.technique} "
            f"--timestep {recipe.timestep}"
        )
    size = f" --precision {recipe.precision}" if recipe.precision != "float16" else ""
    size += f" --reduce pca:{recipe.components}" if recipe.components else ""
    return (
        f"featstore extract --dataset {dataset} --model {recipe.model} --techniques {recipe.technique} "
        f"--timesteps {recipe.timestep}{size}"
    )


def _row_numbers(rows: Sequence[int] | Rows, n_images: int) -> list[int]:
    """`check_rows` as a list; at once for a few that are whole numbers already."""
    if type(rows) is list and len(rows) <= _FEW and all(type(row) is int and 0 <= row < n_images for row in rows):
        return rows
    numbers: list[int] = check_rows(rows, n_images).tolist()
    return numbers


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
    outside = (array < 0) | (array >= n_images)
    if outside.any():
        raise BadRequestError(f"row {int(array[outside][0])} is outside 0..{n_images - 1}")
    return array.astype(np.int64, copy=False)

"""A run: one recipe's features of one data set, layer by layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError, CorruptError, NotCommittedError, unknown_name
from featstore.recipe import Recipe
from featstore.store import arrays, basis, completeness, layout, metadata
from featstore.store import precision as precisions
from featstore.store.basis import Basis, Reduced
from featstore.store.committed import Record, as_records, read_record, settle
from featstore.store.parallel import each
from featstore.store.precision import Quantised, Scales, StoredMaps
from featstore.store.read import LayerReader, Rows, check_rows, extract_request
from featstore.store.write import uncommit, write_layer_block

if TYPE_CHECKING:
    import dask.array
    import torch

    from featstore.store.dataset import StoredDataset


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """What a layer's maps look like."""

    shape: layout.Shape
    """(C, H, W) of a map."""
    dtype: np.dtype[Any]
    """Element type on disk."""
    read_dtype: np.dtype[Any]
    """Element type of what readers return."""
    reduced: Reduced | None = None
    """What the model's channels were projected onto these C; None: they are the model's own."""

    @property
    def image_bytes(self) -> int:
        """Bytes of one map."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of one image: of its map and, where that is int8, of its scales."""
        return precisions.image_bytes(self.shape, self.dtype)


class Run:
    """One recipe's features of one data set, as it was when this object was made.

    The sample table is that of ``dataset``; a run opened again sees a table that has grown. Reading
    and writing from several threads is safe.
    """

    def __init__(self, dataset: StoredDataset, path: str, document: Mapping[str, Any]) -> None:
        own = metadata.own(document)
        name = f"{path}/{layout.ROOT}"
        self.dataset = dataset
        self.path = path
        hint = metadata.remedy(name)
        if own.get("kind") != "run":
            # Before its recipe, which says of another version's run that it is that: what is no run is damage.
            raise CorruptError(f"{name} is damaged: it describes no run", hint=hint)
        self.recipe = Recipe.from_json(own.get("recipe", {}))
        self.fingerprint = self.recipe.fingerprint
        if own.get("fingerprint") != self.fingerprint:
            raise CorruptError(f"{name} is damaged: its recipe does not match its fingerprint", hint=hint)
        if path != layout.run_path(dataset.name, self.recipe.path):
            raise CorruptError(f"{name} describes a run that belongs at {dataset.name}/{self.recipe.path}")
        self.block_length: int = _count(name, "block length", own["block_length"])
        self.batch_size: int = _count(name, "batch size", own["batch_size"])
        self.compressed: bool = own["compressed"] is True
        if not 1 <= self.block_length <= layout.BLOCK_MAX_IMAGES:
            raise CorruptError(f"{name}: block length {self.block_length} is outside 1..{layout.BLOCK_MAX_IMAGES}")
        self.provenance: tuple[Mapping[str, Any], ...] = tuple(own["provenance"])
        if not all(isinstance(entry, dict) for entry in self.provenance):
            raise CorruptError(f"{name}: its provenance is no list of entries", hint=metadata.remedy(name))
        if len(own["layers"]) > layout.MAX_LAYERS:
            raise CorruptError(f"{name} names {len(own['layers'])} layers; at most {layout.MAX_LAYERS} are sound")
        precision = precisions.of(self.recipe.precision)
        reduced = {layer: Reduced.from_json(value) for layer, value in own["reduced"].items()}
        self.layers = {
            layout.check_segment("layer", layer): LayerInfo(
                shape=layout.check_shape(layer, shape),
                dtype=precision.stored,
                read_dtype=precision.read,
                reduced=reduced.get(layer),
            )
            for layer, shape in own["layers"].items()
        }
        self._sound: set[str] = set()
        self._readers: dict[str, LayerReader] = {}

    def __repr__(self) -> str:
        return f"<Run {self.path} of {self.n_images} images, layers {', '.join(self.layers)}>"

    @property
    def n_images(self) -> int:
        """N, rows of the sample table."""
        return len(self.dataset.samples)

    @property
    def n_blocks(self) -> int:
        """Blocks that the N images fill, the last one perhaps in part."""
        return -(-self.n_images // self.block_length)

    @cached_property
    def _wanted(self) -> Record:
        return as_records(self.dataset.samples.digest_bytes(0, self.n_images))

    def _require_digests(self) -> None:
        """Make sure that there are as many images as the data set's document says; a stranger's may say anything."""
        assert len(self._wanted) == self.n_images

    def block_rows(self, block: int) -> range:
        """Rows of the sample table that ``block`` holds.

        Raises:
            BadRequestError: if there is no such block.
        """
        if not 0 <= block < self.n_blocks:
            raise BadRequestError(f"block {block} is outside 0..{self.n_blocks - 1} of {self.path}")
        first = block * self.block_length
        return range(first, min(first + self.block_length, self.n_images))

    def committed(self, layer: str) -> Record:
        """(N,) uint64: what each row was computed from (`digest64`), 0 where it is absent.

        Raises:
            NotFoundError: if the run has no such layer.
            CorruptError: if a record is broken.
        """
        self._check(layer)
        records = self._records(layer, range(self.n_blocks))
        return np.concatenate([np.zeros(0, dtype=np.uint64), *records])[: self.n_images]

    def valid(self, layers: Sequence[str]) -> npt.NDArray[np.bool_]:
        """(N,) bool: rows that are there in every one of ``layers``, computed from today's image.

        A layer that the run does not have makes every row False, as a plan needs it.
        """
        each_layer = list(self.valid_each(layers).values())
        if not each_layer:
            return np.ones(self.n_images, dtype=np.bool_)
        valid: npt.NDArray[np.bool_] = np.logical_and.reduce(each_layer)
        return valid

    def valid_each(self, layers: Sequence[str]) -> dict[str, npt.NDArray[np.bool_]]:
        """`valid` of every one of ``layers`` by itself; records are looked at where no snapshot calls a block complete.

        Raises:
            CorruptError: if a record is broken.
        """
        self._require_digests()
        known = completeness.read(self.dataset.objects, self.path)
        return {layer: self._valid(layer, known.get(layer)) for layer in layers}

    def _valid(self, layer: str, known: completeness.BlockDigests | None) -> npt.NDArray[np.bool_]:
        if layer not in self.layers:
            return np.zeros(self.n_images, dtype=np.bool_)
        self._check(layer)
        complete = np.zeros(self.n_blocks, dtype=np.bool_)
        if known is not None:
            count = min(len(known), self.n_blocks)
            complete[:count] = known[:count] == self.block_digests[:count]
        valid = np.repeat(complete, self.block_length)[: self.n_images]
        blocks = np.flatnonzero(~complete).tolist()
        for block, record in zip(blocks, self._records(layer, blocks), strict=True):
            rows = slice(block * self.block_length, min((block + 1) * self.block_length, self.n_images))
            valid[rows] = record[: rows.stop - rows.start] == self._wanted[rows]
        return valid

    def valid_block(self, block: int, layers: Sequence[str]) -> dict[str, npt.NDArray[np.bool_]]:
        """For each of ``layers``, (images in the block,) bool: rows that are there at this moment.

        Raises:
            BadRequestError: if there is no such block.
            CorruptError: if a record is broken.
        """
        inside = self.block_rows(block)
        wanted = as_records(self.dataset.samples.digest_bytes(inside.start, inside.stop))
        objects = self.dataset.objects
        records = each(objects, lambda name: read_record(objects, self.path, name, block, self.block_length), layers)
        return {layer: record[: len(inside)] == wanted for layer, record in zip(layers, records, strict=True)}

    def _records(self, layer: str, blocks: Sequence[int]) -> list[Record]:
        objects = self.dataset.objects
        return each(objects, lambda block: read_record(objects, self.path, layer, block, self.block_length), blocks)

    @cached_property
    def block_digests(self) -> completeness.BlockDigests:
        """(blocks,): what `featstore.store.completeness` says of each block that is complete today."""
        return completeness.block_digests(self._wanted, self.block_length)

    def note_complete(self) -> None:
        """Put the snapshot of complete blocks, which spares the next plan from looking at their records.

        From now on a power cut takes nothing of what is committed any more.
        """
        objects = self.dataset.objects
        mark, known = completeness.begin(objects, self.path), completeness.read(objects, self.path)
        complete = {}
        for layer, valid in self.valid_each(list(self.layers)).items():
            padded = np.ones(self.n_blocks * self.block_length, dtype=np.bool_)
            padded[: self.n_images] = valid
            whole = padded.reshape(-1, self.block_length).all(axis=1)
            complete[layer] = np.where(whole, self.block_digests, np.uint64(0))
        for layer in self.layers:
            settle(objects, self.path, layer)  # Only now: of others' records, too, that were read.
        if mark is None:
            return  # Rows are being uncommitted: what was read may not hold any more.
        if known.keys() != complete.keys() or any(not np.array_equal(known[name], complete[name]) for name in complete):
            completeness.write(objects, self.path, complete, mark)

    def write_block(self, block: int, rows: Sequence[int], maps: Mapping[str, StoredMaps]) -> int:
        """Store maps of images of one block and commit them, durably, layer by layer.

        Rows of the block that are valid already stay byte for byte, also where they are among
        ``rows``. Different blocks and runs may be written from several threads at once.

        Args:
            block: number of the block.
            rows: row numbers, ascending, all of this block.
            maps: by layer, (len(rows), C, H, W) in the layer's dtype; where that is int8,
                `featstore.store.precision.Quantised`.

        Returns:
            Bytes written.

        Raises:
            BadRequestError: if rows or maps do not fit the run.
            CorruptError: if other rows of the block are broken.
            StorageError: if the disk fails or refuses.
        """
        self.dataset.require_writable()
        indices = check_rows(rows, self.n_images)
        inside = self.block_rows(block)
        if not indices.size or (np.diff(indices) <= 0).any() or indices[0] < inside.start or indices[-1] >= inside.stop:
            raise BadRequestError(
                f"rows {list(rows)[:8]} are not ascending rows of {inside.start}..{inside.stop - 1}, block {block}"
            )
        fitting = {layer: self._fitting(layer, array, len(indices)) for layer, array in maps.items()}
        slots = (indices - inside.start).tolist()
        wanted = np.zeros(self.block_length, dtype=np.uint64)
        wanted[: len(inside)] = as_records(self.dataset.samples.digest_bytes(inside.start, inside.stop))
        written = 0
        for layer, (array, map_scales) in fitting.items():
            self._check(layer)
            written += write_layer_block(
                self.dataset.objects,
                self.path,
                layer,
                block,
                wanted=wanted,
                maps=dict(zip(slots, array, strict=True)),
                image_bytes=self.layers[layer].image_bytes,
                map_scales=None if map_scales is None else dict(zip(slots, map_scales, strict=True)),
                packed=self.compressed,
            )
        return written

    def uncommit(self, rows: Sequence[int] | Rows, layers: Sequence[str] | None = None) -> int:
        """Make rows absent, so that the next extraction computes them anew; for ``--overwrite``.

        Nothing but the records changes: cut off anywhere, each row is there as it was or absent. Other rows stay.

        Args:
            rows: row numbers, any order.
            layers: names of layers; None: all.

        Returns:
            How many of ``rows`` were there, today's or stale, in any of ``layers``.

        Raises:
            BadRequestError: for a row outside 0..N-1.
            NotCommittedError: for a layer that the run does not have.
            StorageError: if the store was opened for reading only, or the disk fails or refuses.
        """
        self.dataset.require_writable()
        indices = np.unique(check_rows(rows, self.n_images))
        names = list(self.layers if layers is None else layers)
        for layer in names:
            self._info(layer)
        blocks = indices // self.block_length
        gone = 0
        for block in np.unique(blocks).tolist():
            slots = indices[blocks == block] - block * self.block_length
            gone += len({slot for layer in names for slot in self._uncommit_slots(layer, block, slots.tolist())})
        return gone

    def _uncommit_slots(self, layer: str, block: int, slots: Sequence[int]) -> list[int]:
        """Make places of a block absent in a layer; those of them that were there."""
        objects = self.dataset.objects
        try:
            record = read_record(objects, self.path, layer, block, self.block_length)
        except CorruptError:
            # Nobody can read any row of it, whatever is asked for.
            uncommit(objects, self.path, layer, block, self.block_length, None)
            return list(slots)
        doomed = {slot: int(record[slot]) for slot in slots if record[slot]}
        if doomed:
            uncommit(objects, self.path, layer, block, self.block_length, doomed)
        return list(doomed)

    def _fitting(self, layer: str, maps: StoredMaps, count: int) -> tuple[npt.NDArray[Any], Scales | None]:
        """``maps`` as they are written, and their scales where they have any."""
        info = self._info(layer)
        array, map_scales = (maps.values, maps.scales) if isinstance(maps, Quantised) else (maps, None)
        if info.dtype == layout.DTYPES["int8"]:
            if map_scales is None:
                raise BadRequestError(
                    f"layer {layer!r} keeps int8 with scales, not {array.dtype}",
                    hint="featstore.store.precision.quantise makes them of floats",
                )
            if map_scales.shape != (count, info.shape[0]) or not precisions.sound(map_scales).all():
                raise BadRequestError(
                    f"scales of layer {layer!r} are {map_scales.shape}; finite, not negative "
                    f"{(count, info.shape[0])} are wanted"
                )
        if array.shape != (count, *info.shape) or array.dtype != info.dtype:
            raise BadRequestError(
                f"maps of layer {layer!r} have shape {array.shape} and dtype {array.dtype}; "
                f"{(count, *info.shape)} and {info.dtype} are wanted"
            )
        return np.ascontiguousarray(array, dtype=info.dtype), map_scales

    def _info(self, layer: str) -> LayerInfo:
        if layer not in self.layers:
            error = unknown_name("layer", layer, self.layers)
            request = extract_request(self.dataset.name, self.recipe)
            raise NotCommittedError(f"run {self.path}: {error}", hint=f"{request} --layers {layer}")
        return self.layers[layer]

    def _check(self, layer: str) -> None:
        """Once per layer: its two array documents are sound and say what this run says.

        Arrays that are shorter than the table are brought to its length where the store may be written.
        """
        self._info(layer)
        if layer in self._sound:
            return
        self._require_digests()
        pairs = self.array_documents(layer)
        shortest = min(arrays.length(self.dataset.objects, key, make) for key, make in pairs)
        if self.dataset.writable and shortest < self.n_images:
            self.mend(layer)
        self._sound.add(layer)

    def array_documents(self, layer: str) -> arrays.Documents:
        """Keys of a layer's array documents, each with the function that makes it for a length."""
        info = self.layers[layer]
        return arrays.documents(self.path, layer, info.shape, info.dtype, self.block_length, compressed=self.compressed)

    def mend(self, layer: str) -> None:
        """Bring a layer's array documents to the length of the sample table, and damaged ones to order."""
        arrays.mend(self.dataset.objects, self.path, self.array_documents(layer), self.n_images)

    def reader(self, layer: str) -> LayerReader:
        """What reads ``layer``: picklable, opens nothing until it is asked for rows.

        Raises:
            NotCommittedError: if the run has no such layer.
            CorruptError: if the layer's array documents are damaged.
        """
        if layer in self._readers:
            return self._readers[layer]
        self._check(layer)
        info = self.layers[layer]
        reader = LayerReader(
            objects=self.dataset.objects,
            path=self.path,
            dataset=self.dataset.name,
            recipe=self.recipe,
            layer=layer,
            shape=info.shape,
            dtype=info.read_dtype,
            stored_dtype=info.dtype,
            packed=self.compressed,
            block_length=self.block_length,
            wanted=self._wanted,
        )
        self._readers[layer] = reader
        return reader

    def __getitem__(self, layer: str) -> dask.array.Array:
        """The layer as a lazy dask array (N, C, H, W), chunks of one block, one task each.

        Computing a chunk raises NotCommittedError where rows are absent or stale and CorruptError
        where bytes are broken.
        """
        return self.reader(layer).dask()

    def lazy(self, layer: str, chosen: npt.NDArray[np.bool_]) -> dask.array.Array:
        """``run[layer]`` that reads the chosen rows only: the others are NaN, and may be absent.

        A head that asks for labelled rows must not fail because an image beside them was broken.

        Args:
            layer: name of the layer.
            chosen: mask (N,) of rows.
        """
        return self.reader(layer).dask(chosen)

    def numpy(self, layer: str, rows: Sequence[int] | Rows) -> npt.NDArray[Any]:
        """Maps of ``rows`` (row numbers, any order), (len(rows), C, H, W) in the layer's ``read_dtype``.

        Raises:
            BadRequestError: for a row outside 0..N-1.
            NotCommittedError: for a layer the run has not, and rows that are absent or stale.
            CorruptError: for bytes that do not match their checksum.
        """
        return self.reader(layer).rows(rows)

    def torch(self, layer: str, rows: Sequence[int] | Rows) -> torch.Tensor:
        """`numpy` as a CPU tensor that owns its memory."""
        import torch

        return torch.from_numpy(self.numpy(layer, rows))

    def blocks(
        self, layers: Sequence[str], *, rows: Sequence[int] | Rows | None = None, seed: int | None = None
    ) -> Iterator[tuple[Rows, dict[str, npt.NDArray[Any]]]]:
        """Maps block by block: (row numbers, {layer: (rows in this block, C, H, W)}).

        Args:
            layers: names of layers.
            rows: which images; None is all of them, refused where one is absent or stale. For what
                there is, pass ``numpy.flatnonzero(run.valid(layers))``.
            seed: shuffles the order of the blocks and of the rows within each; None keeps theirs.
        """
        readers = {layer: self.reader(layer) for layer in layers}
        chosen = np.arange(self.n_images) if rows is None else check_rows(rows, self.n_images)
        numbers = chosen // self.block_length
        order = np.unique(numbers)
        random = None if seed is None else np.random.default_rng(seed)
        if random is not None:
            random.shuffle(order)
        for block in order.tolist():
            members = chosen[numbers == block]
            if random is not None:
                random.shuffle(members)
            yield members, {layer: reader.rows(members) for layer, reader in readers.items()}

    def layer_bytes(self, layer: str) -> int:
        """Bytes of a layer's shards on disk."""
        self._require_digests()
        objects, dtype = self.dataset.objects, self.layers[layer].dtype
        keys = [key for block in range(self.n_blocks) for key in layout.layer_shards(self.path, layer, block, dtype)]
        return sum(objects.size_bytes(key) for key in keys)

    def basis(self, layer: str) -> Basis | None:
        """What the channels of ``layer`` were projected with; None if they are the model's own.

        Raises:
            NotCommittedError: if the run has no such layer.
            CorruptError: if it is gone or damaged.
        """
        info = self._info(layer)
        if info.reduced is None:
            return None
        return basis.load(self.dataset.objects, self.path, layer, info.reduced, info.shape[0])


def _count(name: str, what: str, value: object) -> int:
    """``value`` as a number of images that the document ``name`` speaks of."""
    if type(value) is not int:
        raise CorruptError(f"{name}: {what} {value!r} is no whole number", hint=metadata.remedy(name))
    return value

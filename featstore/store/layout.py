"""Where everything lies in a store, and the zarr v3 documents that describe it.

::

    <store>/zarr.json                                      group
    <store>/catalog/<dataset>~<model>~<slug>-<8 hex>~t050.json    one a run, put when it is created
    <store>/catalog.json                                   all of them, a snapshot for readers that cannot list
    <store>/<dataset>/zarr.json                            group of a data set: how many images it has
    <store>/<dataset>/samples/{key,split,digest}           its sample table, arrays of N rows
    <store>/<dataset>/<model>/zarr.json                    group
    <store>/<dataset>/<model>/<slug>-<8 hex>/zarr.json     group
    .../t050/zarr.json                                     group of a run: recipe, block length, layers
    .../t050/<layer>/zarr.json, c.<block>.0.0.0            array (image, channel, y, x), a shard a block
    .../t050/scales/<layer>/zarr.json, c.<block>.0         array (image, channel), where maps are int8
    .../t050/reduce/<layer>/zarr.json, c.0.0               array (row, channel): what reduced the layer's channels
    .../t050/committed/<layer>/zarr.json, c.<block>        array (image,), what exists

Chunk names use the separator "." that zarr allows: one file a shard instead of a file in three
folders, which measured 1.3 to 1.5 ms against 0.6 ms for a small durable shard.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError, CorruptError

FORMAT = 2
"""Version of the layout on disk; a store of another one is refused."""
BLOCK_TARGET_BYTES = 64 << 20
BLOCK_MAX_IMAGES = 64
MAP_MAX_BYTES = 4 << 30
"""Size of one map beyond which a store is refused."""
MAX_LAYERS = 4096
"""Layers of a run beyond which it is refused: each of them costs every plan a look at its documents."""
COMMITTED = "committed"
SAMPLES = "samples"
SCALES = "scales"
REDUCE = "reduce"
CATALOG = "catalog"
CATALOG_FILE = "catalog.json"
ROOT = "zarr.json"
RESERVED = frozenset({COMMITTED, SAMPLES, SCALES, REDUCE, CATALOG, CATALOG_FILE, ROOT, "c"})

DTYPES: Mapping[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("|i1"),
}
"""Element types on disk by the recipe's precision."""

RAW: Sequence[Mapping[str, Any]] = ({"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"})
"""Codecs of numbers as they are, little-endian, with a checksum."""

Shape = tuple[int, int, int]
RUN_LEVELS = 3
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,119}")


def is_segment(name: object) -> bool:
    """Whether ``name`` can be one level of a path in a store; see `check_segment`."""
    return (
        isinstance(name, str)
        and _SEGMENT.fullmatch(name) is not None
        and not name.startswith("__")
        and name not in RESERVED
    )


def check_segment(what: str, name: str) -> str:
    """``name`` if it can be one level of a path in a store.

    Letters, digits, ".", "_" and "-", 120 at most, no "." in front, nothing that the layout uses:
    so a name can neither leave the store nor hide in it, wherever it came from.

    Raises:
        BadRequestError: if it cannot.
    """
    if not is_segment(name):
        raise BadRequestError(
            f"{what} {name!r} cannot be a name in a store",
            hint="names are letters, digits, '.', '_' and '-', at most 120, not starting with '.'; "
            f"{', '.join(sorted(RESERVED))} are taken",
        )
    return name


def run_path(dataset: str, recipe_path: str) -> str:
    """Path of a run below the store: model, technique and timestep below the data set, every level checked."""
    levels = recipe_path.split("/")
    for segment in levels:
        check_segment("path level", segment)
    if len(levels) != RUN_LEVELS:
        raise BadRequestError(f"{recipe_path!r} is no path of a run: {RUN_LEVELS} levels are wanted")
    return f"{check_segment('data set', dataset)}/{recipe_path}"


def catalog_key(path: str) -> str:
    """Key of the catalog's entry for the run (or copy of the data set's table) at ``path``."""
    return f"{CATALOG}/{path.replace('/', '~')}.json"


def block_length(layers: Iterable[Shape], itemsize_bytes: int) -> int:
    """Images in a block: as many as fill 64 MiB of the largest layer, between 1 and 64."""
    largest = max(math.prod(shape) for shape in layers) * itemsize_bytes
    return max(1, min(BLOCK_MAX_IMAGES, BLOCK_TARGET_BYTES // largest))


def shard_key(run: str, layer: str, block: int) -> str:
    """Key of a layer's shard."""
    return f"{run}/{layer}/c.{block}.0.0.0"


def scales_key(run: str, layer: str) -> str:
    """Key of the array document of a layer's scales."""
    return f"{run}/{SCALES}/{layer}/zarr.json"


def scales_shard_key(run: str, layer: str, block: int) -> str:
    """Key of a shard of a layer's scales."""
    return f"{run}/{SCALES}/{layer}/c.{block}.0"


def layer_shards(run: str, layer: str, block: int, dtype: npt.DTypeLike) -> tuple[str, ...]:
    """Keys of all that holds the images of one block of a layer, in the order in which they are written.

    Whoever copies, counts or removes features goes by this; the block's record (`record_key`) comes after it.

    Args:
        run: path of the run.
        layer: name of the layer.
        block: number of the block.
        dtype: element type of the maps on disk.
    """
    maps = shard_key(run, layer, block)
    return (maps, scales_shard_key(run, layer, block)) if np.dtype(dtype) == DTYPES["int8"] else (maps,)


def record_key(run: str, layer: str, block: int) -> str:
    """Key of a block's committed record in a layer."""
    return f"{run}/{COMMITTED}/{layer}/c.{block}"


def layer_key(run: str, layer: str) -> str:
    """Key of a layer's array document."""
    return f"{run}/{layer}/zarr.json"


def committed_key(run: str, layer: str) -> str:
    """Key of the array document of a layer's committed records."""
    return f"{run}/{COMMITTED}/{layer}/zarr.json"


def group_document(kind: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A zarr group's document; ``attributes`` become featstore's own."""
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"featstore": {"format": FORMAT, "kind": kind, **attributes}},
    }


def array_document(kind: str, shape: list[int], chunk_shape: list[int], **fields: object) -> dict[str, Any]:
    """A zarr array's document; ``fields`` are those that differ from array to array."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "attributes": {"featstore": {"format": FORMAT, "kind": kind}},
        "storage_transformers": [],
        **fields,
    }


def layer_document(
    n_images: int, block: int, shape: Shape, dtype: npt.DTypeLike, codecs: Sequence[Mapping[str, Any]] = RAW
) -> dict[str, Any]:
    """Document of a layer's array: ``block`` images a shard, one image an inner chunk, crc32c on each.

    Absent images read as NaN, never as zeros; where maps are int8, NaN stands in their scales.
    """
    fill = 0 if np.dtype(dtype).kind == "i" else "NaN"
    axes = ["image", "channel", "y", "x"]
    name = np.dtype(dtype).name
    return _sharded_document("layer", n_images, block, shape, axes, codecs, data_type=name, fill_value=fill)


def scales_document(n_images: int, block: int, channels: int) -> dict[str, Any]:
    """Document of a layer's scales: float32 (image, channel), in the same blocks, NaN where an image is absent."""
    axes = ["image", "channel"]
    return _sharded_document(SCALES, n_images, block, (channels,), axes, RAW, data_type="float32", fill_value="NaN")


def _sharded_document(
    kind: str,
    n_images: int,
    block: int,
    entry: tuple[int, ...],
    axes: list[str],
    codecs: Sequence[Mapping[str, Any]],
    **fields: object,
) -> dict[str, Any]:
    sharding = {"chunk_shape": [1, *entry], "codecs": codecs, "index_codecs": RAW, "index_location": "end"}
    return array_document(
        kind,
        [n_images, *entry],
        [block, *entry],
        codecs=[{"name": "sharding_indexed", "configuration": sharding}],
        dimension_names=axes,
        **fields,
    )


def committed_document(n_images: int, block: int) -> dict[str, Any]:
    """Document of a layer's committed records: uint64, one chunk a block, 0 where nothing is."""
    return array_document(
        COMMITTED,
        [n_images],
        [block],
        data_type="uint64",
        fill_value=0,
        codecs=[{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        dimension_names=["image"],
    )


def check_shape(layer: str, shape: object) -> Shape:
    """``shape`` as (C, H, W).

    Raises:
        CorruptError: if it is no such shape, or absurdly large (a store may come from a stranger).
    """
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) != 3
        or not all(type(n) is int and 0 < n < 1 << 31 for n in shape)
        or math.prod(shape) * 4 > MAP_MAX_BYTES
    ):
        raise CorruptError(f"layer {layer!r} has shape {shape!r}; three positive numbers of at most 4 GiB are sound")
    c, h, w = shape
    return c, h, w

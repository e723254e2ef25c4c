"""The array documents of a layer, kept sound and as long as the sample table.

featstore's own reads could do without them (a run's document says all they need), but every other
zarr reader goes by them, so a damaged one is an error and not overlooked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from featstore.errors import CorruptError, NotFoundError
from featstore.store import layout, metadata, packing
from featstore.store.objects import Objects

Documents = tuple[tuple[str, Callable[[int], dict[str, Any]]], ...]
"""Keys, each with the function that makes its document for a number of images."""


def documents(
    run: str, layer: str, shape: layout.Shape, dtype: np.dtype[Any], block_length: int, *, compressed: bool
) -> Documents:
    """The arrays of maps, of their scales if they are int8, and of committed records of a layer of ``run``, a path."""
    codecs = packing.CODECS if compressed else layout.RAW
    maps = (layout.layer_key(run, layer), lambda n: layout.layer_document(n, block_length, shape, dtype, codecs))
    scales = (layout.scales_key(run, layer), lambda n: layout.scales_document(n, block_length, shape[0]))
    committed = (layout.committed_key(run, layer), lambda n: layout.committed_document(n, block_length))
    return (maps, scales, committed) if dtype == layout.DTYPES["int8"] else (maps, committed)


def length(objects: Objects, key: str, make: Callable[[int], dict[str, Any]]) -> int:
    """Number of images that the array document at ``key`` speaks of.

    Raises:
        CorruptError: if it is gone, damaged, or describes another array than ``make`` does.
    """
    try:
        found = metadata.read(objects, key)
    except NotFoundError:
        raise CorruptError(f"{key} is gone, though its run names the layer", hint=metadata.remedy(key)) from None
    shape = found.get("shape")
    images = shape[0] if isinstance(shape, list) and shape and isinstance(shape[0], int) else -1
    if found != metadata.unseal(metadata.seal(make(images)), key) or images < 0:
        raise CorruptError(f"{key} does not describe the layer that its run names", hint=metadata.remedy(key))
    return images


def mend(objects: Objects, run: str, pairs: Documents, n_images: int) -> None:
    """Write those documents anew that are damaged, gone, or shorter than ``n_images``; never shorten one."""
    with objects.lock(run):
        for key, make in pairs:
            try:
                if length(objects, key, make) >= n_images:
                    continue
            except CorruptError:
                # Its own length cannot be trusted. A table that grew meanwhile lengthens it on the next write.
                pass
            metadata.write(objects, key, make(n_images))

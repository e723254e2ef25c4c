"""Export to safetensors: a file for some consecutive images, a tensor (n, C, H, W) a layer.

The header's metadata has one entry, ``featstore``: JSON with data set, recipe and fingerprint, and the key, split and
digest of each of the n images. (One entry, because the order of several changes from call to call.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from featstore.errors import StorageError
from featstore.pipelines.export_writer import Chunk, ExportedLayer, Target

NAME = "safetensors"
METADATA = "featstore"
"""The one entry of a file's metadata."""


def require(layers: Sequence[str]) -> None:
    """Nothing is needed; no layer's name can be that of the metadata, which begins with two underscores."""


def overhead_bytes(layer: ExportedLayer) -> int:
    """Next to nothing: the header is one for many images."""
    return 0


def file_name(number: int, of: int) -> str:
    """Name of one of the files."""
    return f"features-{number:05d}-of-{of:05d}.safetensors"


def open_writer(target: Target) -> SafetensorsWriter:
    """What writes a run."""
    return SafetensorsWriter(target)


class SafetensorsWriter:
    """Writes a file a chunk."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def write(self, chunk: Chunk) -> list[str]:
        """Write some images; returns the name of their file, once for each."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        run = self._target.run
        name = file_name(chunk.number, self._target.chunks)
        told = {
            "dataset": run.dataset.name,
            "recipe": run.recipe.to_json(),
            "fingerprint": run.fingerprint,
            "keys": chunk.keys,
            "splits": chunk.splits,
            "sha256": chunk.digests,
        }
        tensors = {layer: np.ascontiguousarray(maps) for layer, maps in chunk.maps.items()}
        try:
            save_file(tensors, self._target.folder / name, metadata={METADATA: json.dumps(told, ensure_ascii=False)})
        except SafetensorError as error:
            raise StorageError(f"cannot write {name}: {error}", hint="free space or name another folder") from error
        return [name] * len(chunk.keys)

    def finish(self) -> None:
        """Nothing comes after."""

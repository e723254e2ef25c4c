"""Export to Hugging Face `datasets`: a folder that `datasets.load_from_disk` opens, memory-mapped.

Columns ``key``, ``split``, ``sha256``, and an ``Array3D`` (C, H, W) a layer. It opens in numpy format, in the element
type of the features.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError, StorageError
from featstore.pipelines.export_writer import Chunk, ExportedLayer, Target
from featstore.recipe import canonical_json
from featstore.whole_file import write_whole

NAME = "datasets"
COLUMNS = ("key", "split", "sha256")
"""Columns beside the layers."""
_STATE = "state.json"
_INFO = "dataset_info.json"
_OFFSET_BYTES = 4
_FINGERPRINT_CHARS = 16


def require(layers: Sequence[str]) -> None:
    """Refuse if the package is absent, or a layer has the name of another column.

    Raises:
        BadRequestError: in both cases.
    """
    if importlib.util.find_spec("datasets") is None:
        raise BadRequestError(
            "--format datasets needs the package `datasets`, which is not installed",
            hint="pip install 'featstore[datasets]'",
        )
    if taken := [layer for layer in layers if layer in COLUMNS]:
        raise BadRequestError(f"layer {taken[0]!r} is called like a column", hint="--format safetensors takes it")


def overhead_bytes(layer: ExportedLayer) -> int:
    """Where each row, channel and map begins."""
    channels, height, _ = layer.shape
    return _OFFSET_BYTES * (channels * height + channels + 1)


def open_writer(target: Target) -> DatasetsWriter:
    """What writes a run."""
    return DatasetsWriter(target)


class DatasetsWriter:
    """Writes a file in Arrow's format a chunk, and at last what makes them one data set.

    `datasets` itself writes each chunk as a data set of its own. Saving one from all of them would write everything
    a second time; so their files are put side by side, described as `datasets` described the first one, and read
    back before they are called whole.
    """

    def __init__(self, target: Target) -> None:
        import datasets

        self._target = target
        self._features = datasets.Features(
            {
                **{column: datasets.Value("string") for column in COLUMNS},
                **{name: datasets.Array3D(one.shape, one.dtype.name) for name, one in target.layers.items()},
            }
        )
        self._dtype = next(iter(target.layers.values())).dtype.name
        self._files: list[str] = []
        self._state: dict[str, Any] = {}
        self._identity = hashlib.sha256(canonical_json([target.run.fingerprint, sorted(target.layers)]))
        self._images = 0

    def write(self, chunk: Chunk) -> list[str]:
        """Write some images; returns the name of their file, once for each."""
        import datasets
        import pyarrow

        piece = self._target.folder / f"piece-{chunk.number}"
        schema = self._features.arrow_schema
        columns = dict(zip(COLUMNS, (chunk.keys, chunk.splits, chunk.digests), strict=True))
        arrays = [pyarrow.array(values) for values in columns.values()]
        arrays += [_column(chunk.maps[name], schema.field(name).type) for name in self._target.layers]
        info = datasets.DatasetInfo(features=self._features, description=self._description())
        with _quiet():
            # With a fingerprint of ours, as one that it makes is a hash of every byte.
            made = datasets.Dataset(pyarrow.table(arrays, schema=schema), info=info, fingerprint=f"{chunk.number:016x}")
            made.with_format("numpy", dtype=self._dtype).save_to_disk(piece, num_shards=1)
        state = json.loads((piece / _STATE).read_text(encoding="utf-8"))
        (file,) = state["_data_files"]
        name = f"data-{chunk.number:05d}-of-{self._target.chunks:05d}.arrow"
        (piece / file["filename"]).rename(self._target.folder / name)
        if not self._files:
            self._state = state
            (piece / _INFO).rename(self._target.folder / _INFO)
        shutil.rmtree(piece)
        self._files.append(name)
        self._identity.update(canonical_json([chunk.keys, chunk.digests]))
        self._images += len(chunk.keys)
        return [name] * len(chunk.keys)

    def finish(self) -> None:
        """Describe the whole, and read it back.

        Raises:
            StorageError: if `datasets` does not read what was written.
        """
        import datasets

        # It names results that are derived from these images in the cache, so it has to tell exports apart.
        fingerprint = self._identity.hexdigest()[:_FINGERPRINT_CHARS]
        state = self._state | {"_data_files": [{"filename": name} for name in self._files], "_fingerprint": fingerprint}
        write_whole(self._target.folder / _STATE, json.dumps(state, indent=2, sort_keys=True).encode(), durable=False)
        with _quiet():
            read = datasets.load_from_disk(self._target.folder)
        if len(read) != self._images or read.features != self._features:
            raise StorageError(
                f"datasets {datasets.__version__} reads {len(read)} of {self._images} images back, as {read.features}",
                hint="--format safetensors does without that package; please report this",
            )

    def _description(self) -> str:
        recipe = self._target.run.recipe
        return (
            f"Diffusion features of data set {self._target.run.dataset.name}: model {recipe.model}, "
            f"technique {recipe.technique}, timestep {recipe.timestep}; recipe {self._target.run.fingerprint}"
        )


def _column(maps: npt.NDArray[Any], kind: Any) -> Any:
    """Maps (n, C, H, W) as a column of type ``kind``, lists of lists of lists, without a copy."""
    import pyarrow

    values = pyarrow.array(np.ascontiguousarray(maps).reshape(-1))
    for axis in (3, 2, 1):
        # Where each row, then each channel, then each map begins, and the last one ends.
        offsets = np.arange(0, len(values) + 1, maps.shape[axis], dtype=np.int32)
        values = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), values)
    return pyarrow.ExtensionArray.from_storage(kind, values)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of `datasets`: there is one already."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()

"""What a store holds, found without walking through it.

``catalog/<run>.json`` is put when a run is created and holds a copy of the run's own document;
``catalog/<dataset>.json`` holds one of the sample table. They are the two documents that nothing else
in a store could be rebuilt from, so a damaged one is restored from its copy by `verify --repair`.
``catalog.json`` is a snapshot of it all for readers that cannot list a folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from featstore.errors import BadRequestError, NotFoundError
from featstore.store import layout, metadata
from featstore.store.objects import Objects

if TYPE_CHECKING:
    from featstore.store.run import Run
    from featstore.store.store import Store


def entry(path: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """The catalog's document for the run or data set at ``path``, with a copy of its ``document``."""
    own = {k: v for k, v in metadata.own(document).items() if k != metadata.DIGEST}
    return {"format": metadata.FORMAT, "path": path, "copy": own}


def put_entry(objects: Objects, path: str, document: Mapping[str, Any]) -> None:
    """Write the entry of ``path`` if it is not there as it should be."""
    key = layout.catalog_key(path)
    data = metadata.seal(entry(path, document))
    try:
        same = objects.get(key) == data
    except NotFoundError:
        same = False
    if not same:
        objects.put(key, data)


def paths(objects: Objects, dataset: str | None = None) -> list[str]:
    """Paths of the runs in the catalog, of one data set or all, sorted.

    Files that cannot be ours, such as names that would lead out of the store, are passed over.
    """
    found = []
    for name in objects.names(layout.CATALOG):
        path = name.removesuffix(".json").split("~")
        if not name.endswith(".json") or len(path) != 4 or (dataset is not None and path[0] != dataset):
            continue
        try:
            found.append("/".join(layout.check_segment("path level", segment) for segment in path))
        except BadRequestError:
            continue
    return found


def write_snapshot(store: Store) -> None:
    """Put ``catalog.json``: every run of every data set with its recipe and layers."""
    datasets = [store.dataset(name) for name in store.datasets()]
    document = {
        "format": metadata.FORMAT,
        "datasets": {dataset.name: len(dataset.samples) for dataset in datasets},
        "runs": [run_entry(run) for dataset in datasets for run in dataset.runs()],
    }
    metadata.write(store.objects, layout.CATALOG_FILE, document)


def run_entry(run: Run) -> dict[str, Any]:
    """What ``catalog.json`` says of a run."""
    return {
        "path": run.path,
        "dataset": run.dataset.name,
        "fingerprint": run.fingerprint,
        "recipe": run.recipe.to_json(),
        "block_length": run.block_length,
        "layers": {layer: list(info.shape) for layer, info in run.layers.items()},
    }


def describe(store: Store, dataset: str | None = None) -> dict[str, Any]:
    """What the store holds, as the JSON of ``featstore info``.

    ``committed`` counts images that are valid in every layer of the run; ``shape`` is (C, H, W);
    ``bytes`` are those of shards on disk.

    Raises:
        NotFoundError: if there is no data set of that name.
    """
    datasets = []
    total = 0
    for name in [dataset] if dataset is not None else store.datasets():
        stored = store.dataset(name)
        runs = [_describe_run(run) for run in stored.runs()]
        total += sum(layer["bytes"] for run in runs for layer in run["layers"].values())
        datasets.append({"name": name, "images": len(stored.samples), "runs": runs})
    return {"store": store.url, "datasets": datasets, "bytes": total}


def _describe_run(run: Run) -> dict[str, Any]:
    return {
        "model": run.recipe.model,
        "technique": run.recipe.technique,
        "timestep": run.recipe.timestep,
        "fingerprint": run.fingerprint,
        "committed": int(run.valid(list(run.layers)).sum()),
        "images": run.n_images,
        "layers": {
            layer: {"shape": list(info.shape), "dtype": info.dtype.name, "bytes": run.layer_bytes(layer)}
            for layer, info in run.layers.items()
        },
    }

"""What a store holds, found without walking through it.

``catalog/<run>.json`` is put when a run is created and holds a copy of the run's own document;
``catalog/<dataset>.json`` holds one of the sample table. They are the two documents that nothing else
in a store could be rebuilt from, so a damaged one is restored from its copy by `verify --repair`.
``catalog.json`` is a snapshot of it all for readers that cannot list a folder.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featstore.errors import CorruptError, NotFoundError
from featstore.store import differences, layout, metadata
from featstore.store.objects import Objects

if TYPE_CHECKING:
    from featstore.store.meaning import Query
    from featstore.store.run import Run
    from featstore.store.store import Store


def entry(path: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """The catalog's document for the run or data set at ``path``, with a copy of its ``document``."""
    own = {k: v for k, v in metadata.own(document).items() if k != metadata.DIGEST}
    return {"format": layout.FORMAT, "path": path, "copy": own}


def put_entry(objects: Objects, path: str, document: Mapping[str, Any]) -> None:
    """Write the entry of ``path`` if it is not there as it should be."""
    key = layout.catalog_key(path)
    data = metadata.seal(entry(path, document))
    try:
        same = objects.get(key, max_bytes=len(data)) == data
    except (NotFoundError, CorruptError):
        same = False
    if not same:
        objects.put(key, data)


def paths(objects: Objects, dataset: str | None = None) -> list[str]:
    """Paths of the runs in the catalog, of one data set or all, sorted.

    Files that cannot be ours, such as names that would lead out of the store, are passed over.
    """
    if objects.can_list:
        names = [name.removesuffix(".json") for name in objects.names(layout.CATALOG) if name.endswith(".json")]
        found = [name.split("~") for name in names]
    else:
        found = [path.split("/") for path in _snapshot(objects)[1]]
    return [
        "/".join(path)
        for path in found
        if len(path) == 4 and dataset in (None, path[0]) and all(layout.is_segment(segment) for segment in path)
    ]


def datasets(objects: Objects) -> list[str]:
    """Names of the data sets in the store, sorted."""
    names = objects.names("") if objects.can_list else _snapshot(objects)[0]
    return [name for name in names if layout.is_segment(name) and objects.exists(f"{name}/{layout.ROOT}")]


def _snapshot(objects: Objects) -> tuple[list[str], list[str]]:
    """Names of data sets and paths of runs by ``catalog.json``, for places that cannot be listed; unchecked, sorted."""
    try:
        document = metadata.read(objects, layout.CATALOG_FILE)
    except NotFoundError:
        raise NotFoundError(
            f"{objects.url!r} has no {layout.CATALOG_FILE}, which says what is in a store that cannot be listed",
            hint="share it with `featstore serve`, or run `featstore verify --repair` where it lies",
        ) from None
    try:
        return sorted(map(str, document["datasets"])), sorted(str(run["path"]) for run in document["runs"])
    except (KeyError, TypeError) as error:
        raise CorruptError(
            f"{layout.CATALOG_FILE} does not say what is in the store: {error!r}",
            hint=metadata.remedy(layout.CATALOG_FILE),
        ) from None


def write_snapshot(store: Store) -> None:
    """Put ``catalog.json``: every run of every data set with its recipe and layers."""
    datasets = [store.dataset(name) for name in store.datasets()]
    document = {
        "format": layout.FORMAT,
        "datasets": {dataset.name: len(dataset.samples) for dataset in datasets},
        "runs": [run_entry(run) for dataset in datasets for run in dataset.runs()],
    }
    metadata.write(store.objects, layout.CATALOG_FILE, document)


def forget(objects: Objects, path: str) -> None:
    """Take the run or data set at ``path`` out of ``catalog.json``, where there is a sound one."""
    try:
        document = metadata.read(objects, layout.CATALOG_FILE)
        runs = [entry for entry in document["runs"] if path not in (entry["path"], entry["dataset"])]
        datasets = {name: count for name, count in document["datasets"].items() if name != path}
    except (NotFoundError, CorruptError, KeyError, TypeError, AttributeError):
        return  # A damaged one is written anew by `verify --repair`.
    metadata.write(objects, layout.CATALOG_FILE, document | {"datasets": datasets, "runs": runs})


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


def describe(store: Store, dataset: str | None = None, query: Query | None = None) -> dict[str, Any]:
    """What the store holds, as the JSON of ``featstore info``.

    ``committed`` counts images that are valid in every layer of the run; ``shape`` is (C, H, W);
    ``dtype`` is that on disk, ``read_dtype`` that of what readers return, if it is another; ``bytes`` are those of
    shards on disk.
    ``differs`` has what tells a run from others of the same model, technique and timestep.

    Args:
        store: the store.
        dataset: only this data set.
        query: only runs that fit, and data sets that have such runs.

    Raises:
        NotFoundError: if there is no data set of that name.
        BadRequestError: if no run has what ``query`` asks for.
    """
    opened = [store.dataset(name) for name in ([dataset] if dataset is not None else store.datasets())]
    there = {stored.name: stored.runs() for stored in opened}
    every = [run for runs in there.values() for run in runs]
    fitting = {run.path for run in (query.select(every) if query else every)}
    datasets: list[dict[str, Any]] = []
    for stored in opened:
        differs = _differs(there[stored.name])
        runs = [_describe_run(run, differs[run.path]) for run in there[stored.name] if run.path in fitting]
        if runs or not query:
            datasets.append({"name": stored.name, "images": len(stored.samples), "runs": runs})
    total = sum(layer["bytes"] for one in datasets for run in one["runs"] for layer in run["layers"].values())
    return {"store": store.url, "datasets": datasets, "bytes": total}


def _differs(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """By path: in what each run differs from those that have its model, technique and timestep."""
    alike: dict[tuple[str, str, int], list[Run]] = defaultdict(list)
    for run in runs:
        alike[run.recipe.model, run.recipe.technique, run.recipe.timestep].append(run)
    return {
        run.path: odd for some in alike.values() for run, odd in zip(some, differences.differences(some), strict=True)
    }


def _describe_run(run: Run, differs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "path": run.path,
        "model": run.recipe.model,
        "technique": run.recipe.technique,
        "timestep": run.recipe.timestep,
        "fingerprint": run.fingerprint,
        "committed": int(run.valid(list(run.layers)).sum()),
        "images": run.n_images,
        "differs": dict(differs),
        "recipe": run.recipe.to_json(),
        "batch_size": run.batch_size,
        "provenance": [dict(entry) for entry in run.provenance],
        "layers": {
            layer: {
                "shape": list(info.shape),
                "dtype": info.dtype.name,
                **({"read_dtype": info.read_dtype.name} if info.read_dtype != info.dtype else {}),
                "bytes": run.layer_bytes(layer),
            }
            for layer, info in run.layers.items()
        },
    }

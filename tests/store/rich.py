"""A small store that has every kind of file there is, and everything that a user reads of it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import featstore.store as fs
from featstore.recipe import pca_of
from featstore.store.basis import Basis

N = 70
REDUCED = {"up1": (3, 4, 4)}

KINDS = {
    "root": r"zarr\.json",
    "data set": r"[a-z]+/zarr\.json",
    "sample group": r".*/samples/zarr\.json",
    "sample array": r".*/samples/(key|split|digest)/zarr\.json",
    "keys": r".*/samples/key/c\.\d+",
    "splits": r".*/samples/split/c\.\d+",
    "digests": r".*/samples/digest/c\.\d+\.0",
    "copy of samples": r"catalog/[a-z]+~samples~.*",
    "copy of a document": r"catalog/.*\.json",
    "note": r"catalog/.*\.complete",
    "mark": r"catalog/.*\.mark",
    "copy of a basis": r"catalog/.*~reduce~.*",
    "catalog.json": r"catalog\.json",
    "run": r".*/t\d{3}/zarr\.json",
    "group": r".*/(committed|scales|reduce)/zarr\.json|[a-z]+/[^/]+(/[^/]+)?/zarr\.json",
    "scales array": r".*/scales/[^/]+/zarr\.json",
    "basis array": r".*/reduce/[^/]+/zarr\.json",
    "committed array": r".*/committed/[^/]+/zarr\.json",
    "layer array": r".*/t\d{3}/[^/]+/zarr\.json",
    "record": r".*/committed/[^/]+/c\.\d+",
    "scales": r".*/scales/[^/]+/c\.\d+\.0",
    "basis": r".*/reduce/[^/]+/c\.0\.0",
    "shard": r".*/c\.\d+\.0\.0\.0",
}
"""Pattern of each kind's names; the first that fits counts."""

READ = {
    "root",
    "data set",
    "keys",
    "splits",
    "digests",
    "run",
    "scales array",
    "committed array",
    "layer array",
    "record",
    "scales",
    "basis",
    "shard",
}
"""Kinds that `read_all` touches; the rest is for other readers, for planning, or to restore something from."""


def kind_of(name):
    return next(kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, name))


def build(url, lab):
    """Two data sets; runs in float16, int8, reduced and packed; one image had changed for a while."""
    rng = np.random.default_rng(0)
    basis = Basis(
        mean=rng.standard_normal(8).astype(np.float32),
        components=np.linalg.qr(rng.standard_normal((8, 8)))[0][:3].astype(np.float32),
        explained=0.75,
    )
    store, run = lab.start(url, N, changed=[3])
    lab.fill(run)
    store.finish([run])
    dataset = store.put_samples("toy", lab.table(N), source="made up")
    options = {"batch_size": 8, "provenance": {"who": "a test"}}
    runs = [
        dataset.create_run(lab.recipe(), lab.LAYERS, **options),
        dataset.create_run(lab.recipe(precision="int8"), lab.LAYERS, **options),
        dataset.create_run(lab.recipe(reduce=pca_of(3, "12" * 32)), REDUCED, bases={"up1": basis}, **options),
        dataset.create_run(lab.recipe(technique="basic"), lab.LAYERS, compress=True, **options),
    ]
    for one in runs:
        lab.fill(one)
    other = store.put_samples("other", lab.table(5), source="made up")
    runs.append(other.create_run(lab.recipe(timestep=0), lab.LAYERS, **options))
    lab.fill(runs[-1])
    store.finish(runs)


def files(url):
    """Bytes of all files that count, by name."""
    root = Path(url)
    found = (path for path in sorted(root.rglob("*")) if path.is_file())
    names = {str(path.relative_to(root)): path for path in found}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(".featstore")}


def read_all(url):
    """Everything that a user reads: the way from the URL to every value, by a reader that has seen nothing before."""
    values = {}
    for dataset in map(fs.open(url).dataset, ("toy", "other")):
        table = dataset.samples.table()
        values[dataset.name] = (table.keys, table.splits, table.digests)
        for run in dataset.runs():
            assert run.valid(list(run.layers)).all()
            for layer in run.layers:
                values[run.path, layer] = run.numpy(layer, range(run.n_images)).tobytes()
                basis = run.basis(layer)
                if basis is not None:
                    values[run.path, layer, "basis"] = basis.components.tobytes() + basis.mean.tobytes()
    return values

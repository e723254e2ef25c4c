"""Everything that one can do with a store, and what comes of it: for stores that mean no good."""

from __future__ import annotations

import contextlib

import numpy as np

import featstore.store as fs
from featstore.errors import FeatstoreError
from featstore.store import catalog, leases
from featstore.store.digest import run_digest
from featstore.store.verify import verify

OK = "ok"


def everything(url, *, write=False):
    """What each call gave, by name: ``ok``, or what it raised, with more where that is no error of ours."""
    outcomes = {}

    def call(name, function):
        try:
            value = function()
        except FeatstoreError as error:
            outcomes[name] = type(error).__name__
            return None
        except Exception as error:  # noqa: BLE001 - told, and then refused by the test
            outcomes[name] = f"{type(error).__name__}: {error!s:.200} in {_where(error)}"
            return None
        outcomes[name] = OK
        return value

    store = call("open", lambda: fs.open(url))
    if store is None:
        return outcomes
    names = call("datasets", store.datasets) or []
    call("find", lambda: store.find(technique="basic"))
    call("describe", lambda: catalog.describe(store))
    for name in names[:5]:
        dataset = call(f"dataset {name}", lambda name=name: store.dataset(name))
        if dataset is not None:
            _dataset(dataset, call)
    call("verify", lambda: verify(store))
    if write:
        call("repair", lambda: verify(fs.create(url), repair=True))
        for name in names[:5]:
            call(f"grow {name}", lambda name=name: _grow(url, name))
    return outcomes


def _grow(url, name):
    store = fs.create(url)
    dataset = store.dataset(name)
    table = fs.SampleTable(keys=(dataset.samples.keys[0], "new"), digests=("1" * 64, "2" * 64), splits=("a", "b"))
    dataset = store.put_samples(name, table, source="somebody")
    for run in dataset.runs()[:5]:
        run.uncommit([0])
    store.finish(dataset.runs())


def _dataset(dataset, call):
    name = dataset.name
    call(f"table {name}", dataset.samples.table)
    call(f"row_of {name}", lambda: dataset.row_of)
    runs = call(f"runs {name}", dataset.runs) or []
    call(f"run {name}", lambda: dataset.run("basic"))
    call(f"bucket {name}", lambda: dataset.bucket(["basic"]))
    for run in runs[:5]:
        layers = list(run.layers)[:3]
        call(f"valid {run.path}", lambda run=run, layers=layers: run.valid(layers))
        call(f"digest {run.path}", lambda run=run: run_digest(run))
        call(f"held {run.path}", lambda run=run: leases.held(run.dataset.objects, run.path))
        call(f"blocks {run.path}", lambda run=run, layers=layers: next(run.blocks(layers), None))
        call(f"repr {run.path}", lambda run=run: (repr(run), repr(run.provenance), run.fingerprint, run.compressed))
        for layer in layers:
            where = f"{run.path}/{layer}"
            call(f"committed {where}", lambda run=run, layer=layer: run.committed(layer))
            call(f"numpy {where}", lambda run=run, layer=layer: run.numpy(layer, range(min(run.n_images, 10))))
            call(f"dask {where}", lambda run=run, layer=layer: _first(run[layer]))
            call(f"basis {where}", lambda run=run, layer=layer: run.basis(layer))
            call(f"bytes {where}", lambda run=run, layer=layer: run.layer_bytes(layer))


def _first(array):
    return np.asarray(array[:1].compute(scheduler="sync")) if len(array) else None


def _where(error):
    trace = error.__traceback__
    with contextlib.suppress(AttributeError):
        while trace.tb_next is not None:
            trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename.rpartition('featstore/')[2]}:{trace.tb_lineno}"


def strange(outcomes):
    """What came out that is no error of ours."""
    return {name: text for name, text in outcomes.items() if not text.isidentifier()}

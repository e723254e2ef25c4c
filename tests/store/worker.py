"""Makes stores for the tests, and is the process that they kill.

Run as a script it reads one job a line (JSON) from standard input and forks a child for each: a real
writer in a process of its own, without the half second that a new interpreter would take.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np

import featstore.store as fs
from featstore.errors import FeatstoreError, NotFoundError
from featstore.recipe import Recipe
from featstore.store.committed import digest64
from featstore.store.precision import encoded
from featstore.store.transfer import plan_transfer, transfer

LAYERS = {"up1": (3, 4, 4), "attn-up-cross-2": (2, 8, 8)}
DATASET = "toy"


def digest(i, version=0):
    return hashlib.sha256(f"image {i} v{version}".encode()).hexdigest()


def table(n, changed=()):
    return fs.SampleTable(
        keys=tuple(f"img{i:04d}" for i in range(n)),
        digests=tuple(digest(i, int(i in changed)) for i in range(n)),
        splits=tuple("train" if i % 2 else "test" for i in range(n)),
    )


def recipe(**changes):
    fields = {
        "model": "reference",
        "weights_digest": "ab" * 32,
        "technique": "controlnet:canny+lora",
        "parameters": {"prompt": "a horse", "scale": 1.0},
        "timestep": 50,
        "height_px": 64,
        "width_px": 64,
    }
    return Recipe(**(fields | changes))


def map_of(value, layer, dtype=np.float16, layers=LAYERS):
    """The map that an image with digest64 ``value`` has in ``layer``."""
    rng = np.random.default_rng([value, zlib.crc32(layer.encode())])
    return rng.standard_normal(layers[layer], dtype=np.float32).astype(dtype)


def maps_of(run, rows, layer, layers=LAYERS):
    digests = run.dataset.samples.digests
    floats = np.stack([map_of(digest64(digests[row]), layer, np.float32, layers) for row in rows])
    return encoded(floats, run.recipe.precision)


def start(url, n=100, changed=(), layers=LAYERS, **changes):
    store = fs.create(url)
    dataset = store.put_samples(DATASET, table(n, changed), source="made up")
    run = dataset.create_run(recipe(**changes), layers, batch_size=8, provenance={"who": "a test"})
    return store, run


def fill(run, piece=64, rows=None):
    """What an extraction does: write every row that is not valid, ``piece`` rows at a time."""
    layers = list(run.layers)
    todo = ~run.valid(layers)
    for block in range(run.n_blocks):
        inside = [row for row in run.block_rows(block) if todo[row] and (rows is None or row in rows)]
        for at in range(0, len(inside), piece):
            some = inside[at : at + piece]
            run.write_block(block, some, {layer: maps_of(run, some, layer) for layer in layers})


def full(url, n=100, **options):
    store, run = start(url, n, **options)
    fill(run)
    store.finish([run])
    return store, run


def files(url):
    """Bytes of every file of a store but its locks and marks; a note of complete blocks without the mark in it."""
    root = Path(url)
    found = sorted(path for path in root.rglob("*") if path.is_file())
    found = {str(p.relative_to(root)): p.read_bytes() for p in found if not p.name.startswith("lock-")}
    return {name: _blocks(name, data) for name, data in found.items() if not name.endswith(".mark")}


def _blocks(name, data):
    if name.endswith(".complete"):
        with contextlib.suppress(ValueError, KeyError):
            return json.dumps(json.loads(data)["blocks"]).encode()
    return data


def die_at(step):
    """SIGKILL this process right before its ``step``-th call that changes the disk."""
    count = 0

    def counted(name):
        original = getattr(os, name)

        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, call)

    for name in ("writev", "fsync", "replace", "mkdir", "link"):
        counted(name)


def do(job):
    if job.get("uid") and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(job["uid"])
        os.setuid(job["uid"])
    if job.get("probe"):
        return {"error": None, "outcomes": probe(job)}
    if job.get("file_limit_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit_bytes"], resource.RLIM_INFINITY))
    begin = time.perf_counter()
    try:
        if job.get("from"):
            return copy(job)
        store, run = start(job["url"], job["n"], job.get("changed", ()))
        begin = time.perf_counter()
        say({"filling": True})
        if job.get("die_at"):
            die_at(job["die_at"])
        fill(run, job.get("piece", 64), job.get("rows"))
        store.finish([run])
    except FeatstoreError as error:
        return {"error": type(error).__name__, "message": str(error), "hint": error.hint}
    return {"error": None, "seconds": time.perf_counter() - begin}


def copy(job):
    """Push the store ``from`` to ``url``."""
    source = fs.open(job["from"])
    try:
        there = fs.open(job["url"])
    except NotFoundError:
        there = None
    plan = plan_transfer(source, there)
    target = fs.create(job["url"])
    begin = time.perf_counter()
    say({"filling": True})
    transfer(plan, target, lambda _: None)
    return {"error": None, "seconds": time.perf_counter() - begin}


def probe(job):
    """Everything that one can do with a store, in little memory and time."""
    from probe import everything

    os.fsync = lambda fd: None  # Nobody cuts the power, and there are many stores.
    # The room that the process has taken until now, in pages.
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + job["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (job["cpu_seconds"],) * 2)
    return everything(job["url"], write=job["write"])


def prepare_probes():
    """Import here, once, what `probe` needs: those who are forked from here have it."""
    import dask.array
    from probe import everything

    dask.array.zeros(1).compute(scheduler="sync")
    everything("/nonexistent")


def say(value):
    os.write(1, json.dumps(value).encode() + b"\n")


def serve():
    last = None
    for line in sys.stdin:
        # Only now is the last child let go of: until then its id cannot be given to another process.
        if last is not None:
            os.waitpid(last, 0)
        job = json.loads(line)
        if job.get("probe"):
            prepare_probes()
        last = os.fork()
        if last == 0:
            say(do(job))
            os._exit(0)
        say({"pid": last})
        say({"status": os.waitid(os.P_PID, last, os.WEXITED | os.WNOWAIT).si_status})


if __name__ == "__main__":
    serve()

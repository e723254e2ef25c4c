"""A Dask cluster of separate processes on loopback, for benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil

from featstore.errors import FeatstoreError

START_SECONDS = 180.0
"""How long the processes may take to start."""


@contextlib.contextmanager
def cluster(
    processes: int, threads: int, folder: Path, *, cores: int | None = None
) -> Iterator[tuple[str, psutil.Process]]:
    """A scheduler and workers under nannies on loopback; gives its address and the scheduler's process.

    Args:
        processes: of workers.
        threads: of each.
        folder: for what they write; logs among it.
        cores: on which workers run; None: all.
    """
    file = folder / f"scheduler-{uuid.uuid4().hex}.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen[bytes]] = []

    def start(module: str, *words: str) -> subprocess.Popen[bytes]:
        with (folder / f"{module}.log").open("ab") as log:
            line = [sys.executable, "-m", f"distributed.cli.{module}", "--host", "127.0.0.1", "--no-dashboard", *words]
            started.append(subprocess.Popen(line, stdout=log, stderr=log, env=environment))
        return started[-1]

    try:
        scheduler = start("dask_scheduler", "--port", "0", "--scheduler-file", str(file))
        deadline = time.monotonic() + START_SECONDS
        while not file.exists() or not file.read_text().strip():
            if scheduler.poll() is not None or time.monotonic() > deadline:
                raise FeatstoreError(
                    f"no Dask scheduler starts here: {(folder / 'dask_scheduler.log').read_text()[-500:]}"
                )
            time.sleep(0.05)
        address = json.loads(file.read_text())["address"]
        words = ("--nworkers", str(processes), "--nthreads", str(threads), "--memory-limit", "0")
        with _on_cores(cores):
            start("dask_worker", address, *words, "--local-directory", str(folder))
        yield address, psutil.Process(scheduler.pid)
    finally:
        for process in reversed(started):
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    children = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(20)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@contextlib.contextmanager
def _on_cores(count: int | None) -> Iterator[None]:
    """Processes that are started meanwhile keep to so many cores, where the system can do that."""
    if count is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

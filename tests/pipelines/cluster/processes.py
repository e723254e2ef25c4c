"""A scheduler and workers in processes of their own, on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil


def _start(module: str, *words: str, env: dict[str, str], log: Path) -> subprocess.Popen:
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{module}", *words], env=env, stdout=stream, stderr=stream
        )


class Processes:
    """A scheduler, and workers under nannies, which replace those that die."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = ""
        self._scheduler: subprocess.Popen | None = None
        self._nannies: list[subprocess.Popen] = []

    def start_scheduler(self, **environment: str) -> None:
        file = self.folder / "scheduler.json"
        words = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
        self._scheduler = _start(
            "dask_scheduler", *words, env=os.environ | environment, log=self.folder / "scheduler.log"
        )
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text().strip():
            assert self._scheduler.poll() is None, (self.folder / "scheduler.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.address = json.loads(file.read_text())["address"]

    @property
    def scheduler_pid(self) -> int:
        """Of the scheduler's process."""
        assert self._scheduler is not None
        return self._scheduler.pid

    def kill_scheduler(self) -> None:
        """SIGKILL it."""
        assert self._scheduler is not None
        self._scheduler.kill()

    def start_workers(self, count: int, **environment: str) -> subprocess.Popen:
        words = (self.address, "--nworkers", str(count), "--nthreads", "2", "--no-dashboard", "--host", "127.0.0.1")
        words += ("--local-directory", str(self.folder), "--memory-limit", "0")
        nanny = _start("dask_worker", *words, env=os.environ | environment, log=self.folder / "workers.log")
        self._nannies.append(nanny)
        return nanny

    def workers(self) -> list[psutil.Process]:
        """Processes that blocks run in."""
        found = []
        for nanny in self._nannies:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(nanny.pid).children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if "spawn_main" in " ".join(child.cmdline()):
                            found.append(child)
        return found

    def kill_one(self, shuffle: random.Random) -> bool:
        """SIGKILL a worker; False if there is none at the moment."""
        there = self.workers()
        if not there:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            shuffle.choice(there).send_signal(signal.SIGKILL)
            return True
        return False

    def stop_workers(self) -> None:
        for nanny in self._nannies:
            _end(nanny)
        self._nannies = []

    def stop(self) -> None:
        self.stop_workers()
        if self._scheduler is not None:
            _end(self._scheduler)


def _end(process: subprocess.Popen) -> None:
    children = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@contextlib.contextmanager
def processes(folder: Path, **environment: str) -> Iterator[Processes]:
    made = Processes(folder)
    try:
        made.start_scheduler(**environment)
        yield made
    finally:
        made.stop()

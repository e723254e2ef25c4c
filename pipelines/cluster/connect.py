"""The processes of a cluster: started on this machine, or found at a scheduler's address."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from featstore.errors import BadRequestError, StorageError
from featstore.pipelines.cluster.config import ClusterConfig
from featstore.pipelines.cluster.preflight import check_versions, cores_for_each, devices
from featstore.pipelines.device import resolve_device

if TYPE_CHECKING:
    from distributed import Client

WORKER_THREADS = 2
"""One computes; the other reads the next block or writes the last."""
_HOST = "127.0.0.1"
_DEAF = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
"""Ctrl-C goes to all processes of a terminal; workers are stopped by this one, when their blocks are done."""
_SETTINGS: dict[str, Any] = {
    # Workers keep no results, so nothing is gained by pausing one; what takes too much is ended and started anew.
    **{f"distributed.worker.memory.{what}": False for what in ("target", "spill", "pause")},
    # How often a block is tried is counted by `run_tasks`, which tells a block from its neighbours.
    "distributed.scheduler.allowed-failures": 0,
}


class Cluster:
    """Workers, and a client that is connected to them; a context manager.

    A scheduler is connected to at once, for what devices it has decides the plan. Processes of this machine are
    started by `client`, when there is something to do.

    Args:
        config: which.
        note: takes lines for the user.

    Raises:
        StorageError: on entering, if the scheduler is out of reach or has no workers.
        IncompatibleError: on entering, if workers have other versions than this process.
    """

    def __init__(self, config: ClusterConfig, note: Callable[[str], None]) -> None:
        self.config = config
        self._note = note
        self._stack = contextlib.ExitStack()
        self._client: Client | None = None

    def __enter__(self) -> Self:
        try:
            if self.config.scheduler is not None:
                self._connect(self.config.scheduler)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def device(self, name: str | None) -> str:
        """What the workers compute on: ``name``, or what all of them have.

        Raises:
            BadRequestError: if they do not have it.
            IncompatibleError: if some have GPUs and others do not, and nothing is asked for.
        """
        if self.config.scheduler is None:
            device = resolve_device(name)
            return device if device == "cpu" else "cuda"
        return devices(self.client("cpu"), name)

    def client(self, device: str) -> Client:
        """A client of the workers, which are started if they are this machine's and not there yet.

        Args:
            device: what they compute on.

        Raises:
            BadRequestError: if this machine has fewer GPUs than workers are asked for.
            StorageError: if they do not start.
        """
        if self._client is None:
            self._start(device)
        assert self._client is not None
        return self._client

    def cpu_threads(self) -> int:
        """Threads for each worker's forward passes: the cores of its machine, divided among its workers there."""
        assert self._client is not None
        return cores_for_each(self._client)

    def _connect(self, address: str) -> None:
        from distributed import Client

        config = self.config
        try:
            with _quiet():
                client = Client(address, timeout=config.connect_seconds, set_as_default=False)
        except (OSError, TimeoutError, ValueError, TypeError) as error:
            raise _not_started(
                f"the Dask scheduler at {address} cannot be reached ({_line(error)})",
                "start one with `dask scheduler`, or check the address and the firewall",
            ) from error
        self._stack.callback(_close, client)
        try:
            client.wait_for_workers(1, timeout=config.worker_seconds)
        except TimeoutError as error:
            raise _not_started(
                f"the Dask scheduler at {address} has no workers",
                f"start some with `dask worker {address} --nthreads {WORKER_THREADS}`",
            ) from error
        check_versions(client)
        self._client = client

    def _start(self, device: str) -> None:
        count = self.config.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if device == "cpu" and count > cores:
            self._note(f"{count} workers share {cores} cores: more than {cores} gain nothing")
        import dask
        from distributed import Client

        with dask.config.set(_SETTINGS), _deaf(), _quiet():
            try:
                cluster = self._stack.enter_context(_local(count, device))
                client = Client(cluster, timeout=self.config.worker_seconds, set_as_default=False)
                self._stack.callback(_close, client)
                client.wait_for_workers(count, timeout=self.config.worker_seconds)
            except (OSError, TimeoutError, RuntimeError) as error:
                raise _not_started(
                    f"{count} workers cannot be started on this machine ({_line(error)})", "fewer --workers may fit"
                ) from error
        self._client = client
        link = client.dashboard_link
        self._note(f"{count} worker{'s' if count > 1 else ''}" + (f", Dask's dashboard is at {link}" if link else ""))


def _local(count: int, device: str) -> Any:
    """A cluster of so many processes on this machine."""
    import distributed

    common = _common(count)
    if device == "cpu":
        return distributed.LocalCluster(n_workers=count, processes=True, **common)
    gpus = _visible_gpus()
    if count > len(gpus):
        raise BadRequestError(
            f"--workers {count}: this machine has {len(gpus)} usable GPUs, and each worker takes one",
            hint=f"--workers {len(gpus)}, or --device cpu",
        )
    if importlib.util.find_spec("dask_cuda") is not None:
        from dask_cuda import LocalCUDACluster

        return LocalCUDACluster(CUDA_VISIBLE_DEVICES=gpus[:count], n_workers=count, **common)
    return _one_for_each(gpus[:count], common)


def _common(count: int) -> dict[str, Any]:
    """What each of so many workers gets, with a GPU or without."""
    from distributed.system import MEMORY_LIMIT

    return {
        "threads_per_worker": WORKER_THREADS,
        "host": _HOST,
        "dashboard_address": f"{_HOST}:0",
        "silence_logs": logging.CRITICAL,
        "preload": [_DEAF],
        "memory_limit": MEMORY_LIMIT // count,
    }


def _one_for_each(gpus: list[str], common: dict[str, Any]) -> Any:
    """A worker for each GPU, which sees no other, where dask-cuda is not installed."""
    import distributed

    options = {name: common[name] for name in ("host", "silence_logs", "preload", "memory_limit")}
    workers = {
        number: {
            "cls": distributed.Nanny,
            "options": {**options, "nthreads": WORKER_THREADS, "env": {"CUDA_VISIBLE_DEVICES": gpu}},
        }
        for number, gpu in enumerate(gpus)
    }
    place = {"host": _HOST, "dashboard": True, "dashboard_address": common["dashboard_address"]}
    scheduler = {"cls": distributed.Scheduler, "options": place}
    return distributed.SpecCluster(workers=workers, scheduler=scheduler, silence_logs=common["silence_logs"])


def _visible_gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = named.split(",") if named else map(str, range(torch.cuda.device_count()))
    return list(numbers)[: torch.cuda.device_count()]


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that are started inside ignore Ctrl-C from their first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without distributed's own lines about connections that fail: what matters is raised."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _close(client: Client) -> None:
    with _quiet(), contextlib.suppress(OSError, TimeoutError, RuntimeError):
        client.close(timeout=5)


def _not_started(message: str, hint: str) -> StorageError:
    error = StorageError(message, hint=hint)
    error.exit_code = 2  # Nothing was started.
    return error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


__all__ = ["WORKER_THREADS", "Cluster"]

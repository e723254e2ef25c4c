"""How a cluster scales: the real window, scheduler, tasks and writer, with passes that are slept through."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from featstore.errors import FeatstoreError
from featstore.pipelines.bench import simulated
from featstore.pipelines.bench.cluster_memory import client_memory
from featstore.pipelines.bench.cluster_processes import START_SECONDS, cluster
from featstore.pipelines.bench.cluster_reference import IMAGES, reference_scaling
from featstore.pipelines.bench.config import BenchConfig
from featstore.pipelines.bench.scale import Table
from featstore.pipelines.cluster.window import Statistics, Task, run_tasks
from featstore.pipelines.progress import Progress, Silent

if TYPE_CHECKING:
    from distributed import Client

_PROCESSES = 8
"""Most processes that workers are threads of."""
DEFAULT_WORKERS = 64
DEFAULT_IMAGES = 1_000_000


def bench_cluster(config: BenchConfig, folder: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Rates of 1, 2, 4 .. simulated workers, memory of a client by the number of images, the embedded model on 1 and 2.

    A worker is a thread; from 8 workers on they are threads of 8 processes. The scheduler is a process of its own, so
    that its CPU time can be read from the system. What is reported for each number of workers, medians of all repeats:

    - *efficiency*: blocks a second, divided by the number of workers and by the blocks a second of one worker;
    - *of ideal*: blocks a second, divided by what they were if workers did nothing but sleep;
    - *scheduler ms*, *client ms*: CPU time of that process for each block;
    - *store ms*: wall-clock time for a block's lease, its writing and its commit, on the worker.
    """
    progress = progress or Silent()
    most = config.workers or DEFAULT_WORKERS
    counts = [count for count in (2**power for power in range(20)) if count < most] + [most]
    rounds = []
    for repeat in range(config.repeats):
        order = counts if repeat % 2 == 0 else counts[::-1]
        for count in order:
            progress.note(f"{count} simulated workers, {repeat + 1} of {config.repeats}")
            place = folder / f"{repeat}-{count}"
            place.mkdir()
            rounds.append(_measure(count, config.block_seconds, config.blocks, place))
    rows = list(_rows(counts, rounds, config.block_seconds))
    images = config.images or DEFAULT_IMAGES
    sizes = [size for size in (10_000, 100_000, 1_000_000) if size < images] + [images]
    with cluster(1, 2, folder) as (address, _):
        memory = []
        for size in sizes:
            progress.note(f"tasks of {size} images")
            memory.append(client_memory(address, size, folder / f"memory-{size}"))
    real = min(IMAGES, config.images or IMAGES)
    place = folder / "reference"
    place.mkdir()
    return {
        "block_seconds": config.block_seconds,
        "blocks_for_each_worker": config.blocks,
        "workers": rows,
        "memory": memory,
        "reference": reference_scaling(real, config.repeats, min(2, most), place, progress),
    }


def tables(figures: Mapping[str, Any]) -> list[Table]:
    """The figures for people: a row a number of workers, a row a number of images, and what real passes gave."""
    return [
        (
            title,
            [name.replace("_", " ") for name in rows[0]],
            [[_shown(value) for value in row.values()] for row in rows],
        )
        for title, rows in (
            ("simulated workers", figures["workers"]),
            ("memory of the client", figures["memory"]),
            ("embedded model", figures["reference"]),
        )
    ]


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if value < 10 else f"{value:.1f}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """One measurement."""

    workers: int
    seconds: float
    blocks: int
    scheduler_seconds: float
    client_seconds: float
    store_seconds: float
    scheduler_bytes: int
    statistics: Statistics


def _measure(workers: int, block_seconds: float, blocks_each: int, folder: Path) -> _Round:
    from distributed import Client

    processes = _processes(workers)
    count = workers * blocks_each
    run = simulated.make_store(str(folder / "s.zarr"), count + workers)
    simulation = simulated.Simulation(store=str(folder / "s.zarr"), run=run.path, seconds=block_seconds)
    with (
        cluster(processes, workers // processes, folder) as (address, scheduler),
        Client(address, timeout=30) as client,
    ):
        client.wait_for_workers(processes, timeout=START_SECONDS)
        # Imports and the first look at the run are not what is measured.
        first = dataclasses.replace(simulation, seconds=min(0.2, block_seconds))
        _run(client, first, run, count, workers)
        own, begin = [_cpu_seconds(scheduler), time.process_time()], time.perf_counter()
        done, result = _run(client, simulation, run, 0, count)
        seconds = time.perf_counter() - begin
        spent = [_cpu_seconds(scheduler) - own[0], time.process_time() - own[1]]
        size_bytes = scheduler.memory_info().rss
    _expect(done, run, count, workers, processes)
    return _Round(
        workers=workers,
        seconds=seconds,
        blocks=count,
        scheduler_seconds=spent[0],
        client_seconds=spent[1],
        store_seconds=statistics.median(one.store_seconds for one in done),
        scheduler_bytes=size_bytes,
        statistics=result,
    )


def _processes(workers: int) -> int:
    """How many processes workers are threads of, the same number each."""
    return max(number for number in range(1, _PROCESSES + 1) if workers % number == 0)


def _run(
    client: Client, simulation: simulated.Simulation, run: Any, first: int, count: int
) -> tuple[list[simulated.Done], Statistics]:
    found: list[simulated.Done] = []

    def failed(task: Task, reason: str) -> None:
        raise FeatstoreError(f"block {task.key} failed: {reason}")

    tasks = (Task(f"extract-block-{one.block}", one) for one in simulated.blocks(run, first, count))
    result = run_tasks(
        client,
        functools.partial(simulated.compute, simulation),
        tasks,
        done=lambda _, one, __: found.append(one),
        failed=failed,
        note=lambda _: None,
    )
    return found, result


def _expect(done: Sequence[simulated.Done], run: Any, count: int, workers: int, processes: int) -> None:
    """A measurement counts if every block was committed, by workers without torch."""
    layers = list(simulated.LAYERS)
    valid = all(mask[: count * run.block_length].all() for mask in run.valid_each(layers).values())
    if len(done) != count or not valid:
        raise FeatstoreError(f"{len(done)} of {count} simulated blocks came back, all committed: {valid}")
    if any(one.torch for one in done) or len({one.process for one in done}) != processes:
        raise FeatstoreError(f"{workers} simulated workers were not {processes} processes without torch")


def _rows(counts: Iterable[int], rounds: Sequence[_Round], block_seconds: float) -> Iterator[dict[str, float]]:
    rates = {
        count: statistics.median(one.blocks / one.seconds for one in rounds if one.workers == count) for count in counts
    }
    for count in counts:
        same = [one for one in rounds if one.workers == count]
        yield {
            "workers": count,
            "processes": _processes(count),
            "blocks": same[0].blocks,
            "blocks_per_second": rates[count],
            "efficiency": rates[count] / count / rates[1],
            "of_ideal": rates[count] / count * block_seconds,
            "scheduler_ms": statistics.median(1e3 * one.scheduler_seconds / one.blocks for one in same),
            "client_ms": statistics.median(1e3 * one.client_seconds / one.blocks for one in same),
            "store_ms": statistics.median(1e3 * one.store_seconds for one in same),
            "scheduler_mb": statistics.median(one.scheduler_bytes / 1e6 for one in same),
        }


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)

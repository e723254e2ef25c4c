"""What a client needs for a million images: the plan, and the tasks that are made of it."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

import featstore.store
from featstore.pipelines.bench import scale

if TYPE_CHECKING:
    from featstore.pipelines.cluster.job import Block, Job
    from featstore.pipelines.outcome import RunOutcome
    from featstore.pipelines.plan import Plan


def client_memory(address: str, images: int, folder: Path) -> dict[str, float]:
    """Resident memory of a client, in a process of its own, that has tasks for so many images run.

    Tasks are made as an extraction makes them, of a plan for one run that is new, and workers send them back at once.
    *plan bytes an image* is what the data set, the sample table and the plan take; *grown mb* what is added between
    the first tenth of the tasks and the last task.

    Args:
        address: of a scheduler with workers.
        images: of the made-up data set.
        folder: for its store.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(address, images, str(folder), sender))
    process.start()
    sender.close()
    try:
        found: dict[str, float] = receiver.recv()
    finally:
        process.join()
    return found


def _measure(address: str, images: int, folder: str, answer: Any) -> None:
    from distributed import Client

    from featstore.pipelines.cluster.job import blocks_of
    from featstore.pipelines.cluster.window import Task, run_tasks

    own = psutil.Process()
    with Client(address, timeout=30) as client:
        client.wait_for_workers(1, timeout=120)
        before = own.memory_info().rss
        plan, outcomes, job = _plan(images, folder)
        planned = own.memory_info().rss
        seen: list[int] = []
        count = len(np.unique(outcomes[0].blocks))
        marks = {max(1, count // 10), count}
        cpu = time.process_time()

        def done(task: Task, _: object, __: str) -> None:
            seen.append(0)
            if len(seen) in marks:
                sizes.append(own.memory_info().rss)

        def failed(task: Task, reason: str) -> None:
            raise RuntimeError(f"{task.key}: {reason}")

        def tasks() -> Iterator[Task]:
            for block in blocks_of(plan, outcomes, job):
                yield Task(f"extract-block-{block.block}", block)

        sizes: list[int] = []
        found = run_tasks(client, functools.partial(_nothing), tasks(), done=done, failed=failed, note=lambda _: None)
        answer.send(
            {
                "images": images,
                "tasks": found.done,
                "most_tasks_at_once": found.most,
                "plan_bytes_an_image": (planned - before) / images,
                "planned_mb": planned / 1e6,
                "first_mb": sizes[0] / 1e6,
                "last_mb": sizes[-1] / 1e6,
                "grown_mb": (sizes[-1] - sizes[0]) / 1e6,
                "client_ms": 1e3 * (time.process_time() - cpu) / found.done,
            }
        )


def _nothing(block: Block) -> int:
    return len(block.rows)


def _plan(images: int, folder: str) -> tuple[Plan, list[RunOutcome], Job]:
    """A plan to extract one run of a made-up data set, its run created."""
    from featstore.pipelines.cluster.job import make_job
    from featstore.pipelines.outcome import RunOutcome
    from featstore.pipelines.plan import ExtractConfig, make_plan, sample_table

    dataset = scale.Many(images)
    store = featstore.store.create(folder)
    stored = store.put_samples(dataset.info.name, sample_table(dataset), source="made up")
    small = make_plan(ExtractConfig(dataset="toyhorse", techniques="basic", limit=1, store=folder, device="cpu"))
    (one,) = small.runs
    missing = {layer: np.ones(images, dtype=bool) for layer in one.layers}
    planned = dataclasses.replace(one, missing=missing)
    plan = dataclasses.replace(
        small, dataset=dataset, dataset_name=dataset.info.name, wanted=tuple(range(images)), runs=(planned,)
    )
    run = stored.create_run(planned.recipe, planned.layers, batch_size=1, provenance={})
    outcomes = [RunOutcome(planned, run, np.arange(images), {name: mask.copy() for name, mask in missing.items()})]
    return plan, outcomes, make_job(plan, outcomes, "none")

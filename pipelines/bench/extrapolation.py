"""What an extraction of very many images takes: measured rates, stated assumptions, and nothing else.

``python -m featstore.pipelines.bench.extrapolation docs/benchmarks/cluster.json`` prints the tables of docs/scale.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

LAYERS = {"1280x16x16": 1280 * 16 * 16, "1280x16x16, second": 1280 * 16 * 16, "640x32x32": 640 * 32 * 32}
LAYERS |= {"320x64x64": 320 * 64 * 64}
"""Values of each `practical` layer of Stable Diffusion 1.5 at 512 px, an image."""
_BLOCK_BYTES = 64 << 20
_MAX_BLOCK = 64


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What was not measured here."""

    runs: int = 4
    """Techniques times timesteps."""
    pass_seconds: float = 0.04
    """Of one image on one GPU: Stable Diffusion 1.5, 512 px, float16, the autoencoder's share included."""
    value_bytes: int = 2
    """Of a stored value."""
    gpus: int = 64
    gpu_hour_dollars: float = 2.0
    terabyte_month_dollars: float = 23.0
    """Of 10^12 bytes kept in a bucket for a month."""
    thousand_writes_dollars: float = 0.005
    """PUT and LIST requests to a bucket."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What `bench_cluster` saw."""

    scheduler_ms: float
    """CPU time of the scheduler for a block, with the most workers."""
    client_ms: float
    """CPU time of the client for a block, tasks made as an extraction makes them."""
    plan_bytes_an_image: float
    """Memory that the client needs for an image of the data set."""
    client_mb: float
    """Memory of the client beside that."""

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Self:
        """From the benchmark's figures; the largest data set says what an image takes."""
        memory = max(figures["memory"], key=lambda row: row["images"])
        most = max(figures["workers"], key=lambda row: row["workers"])
        return cls(
            scheduler_ms=most["scheduler_ms"],
            client_ms=memory["client_ms"],
            plan_bytes_an_image=memory["plan_bytes_an_image"],
            client_mb=memory["planned_mb"] - memory["plan_bytes_an_image"] * memory["images"] / 1e6,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Extrapolation:
    """What so many images take."""

    images: int
    passes: int
    gpu_hours: float
    days: float
    """With all GPUs."""
    bytes: int
    objects: int
    """Shards and records."""
    tasks: int
    """Blocks, each with all runs."""
    task_seconds: float
    """A task's time on its GPU."""
    scheduler_hours: float
    scheduler_share: float
    """Of the time that the extraction takes; at 1 the scheduler is the limit."""
    most_gpus: int
    """With which the scheduler would be busy all the time."""
    client_hours: float
    client_bytes: float
    gpu_dollars: float
    month_dollars: float
    """For keeping the features a month."""
    write_dollars: float


def block_images(value_bytes: int) -> int:
    """Images of a block: as many as fill 64 MiB of the largest layer, 64 at most."""
    return min(_MAX_BLOCK, _BLOCK_BYTES // (max(LAYERS.values()) * value_bytes))


def extrapolate(images: int, measured: Measured, assumed: Assumptions) -> Extrapolation:
    """What ``images`` take, everything in proportion."""
    passes = images * assumed.runs
    blocks = math.ceil(images / block_images(assumed.value_bytes))
    gpu_hours = passes * assumed.pass_seconds / 3600
    hours = gpu_hours / assumed.gpus
    size = passes * sum(LAYERS.values()) * assumed.value_bytes
    objects = 2 * blocks * assumed.runs * len(LAYERS)
    scheduler_hours = blocks * measured.scheduler_ms / 3.6e6
    # Beside shards and records: a lease for each block and run, and two listings around it.
    writes = objects + 3 * blocks * assumed.runs
    return Extrapolation(
        images=images,
        passes=passes,
        gpu_hours=gpu_hours,
        days=hours / 24,
        bytes=size,
        objects=objects,
        tasks=blocks,
        task_seconds=block_images(assumed.value_bytes) * assumed.runs * assumed.pass_seconds,
        scheduler_hours=scheduler_hours,
        scheduler_share=scheduler_hours / hours,
        most_gpus=round(assumed.gpus * hours / scheduler_hours),
        client_hours=blocks * measured.client_ms / 3.6e6,
        client_bytes=measured.client_mb * 1e6 + images * measured.plan_bytes_an_image,
        gpu_dollars=gpu_hours * assumed.gpu_hour_dollars,
        month_dollars=size / 1e12 * assumed.terabyte_month_dollars,
        write_dollars=writes / 1000 * assumed.thousand_writes_dollars,
    )


def table(columns: Sequence[Extrapolation]) -> str:
    """As Markdown, a column a number of images."""
    rows: list[tuple[str, Callable[[Extrapolation], str]]] = [
        ("passes", lambda one: f"{one.passes:,}"),
        ("GPU hours", lambda one: f"{one.gpu_hours:,.0f}"),
        ("days on all GPUs", lambda one: f"{one.days:,.2f}"),
        ("features", lambda one: _bytes(one.bytes)),
        ("objects", lambda one: f"{one.objects:,}"),
        ("tasks at the scheduler", lambda one: f"{one.tasks:,}"),
        ("a task on its GPU", lambda one: f"{one.task_seconds:.1f} s"),
        ("CPU time of the scheduler", lambda one: f"{one.scheduler_hours:,.2f} h"),
        ("its share of the time", lambda one: f"{100 * one.scheduler_share:.2f} %"),
        ("GPUs that one scheduler can feed", lambda one: f"{one.most_gpus:,}"),
        ("CPU time of the client", lambda one: f"{one.client_hours:,.2f} h"),
        ("memory of the client", lambda one: _bytes(one.client_bytes)),
        ("GPUs cost", lambda one: f"${one.gpu_dollars:,.0f}"),
        ("writing requests cost", lambda one: f"${one.write_dollars:,.0f}"),
        ("keeping the features costs", lambda one: f"${one.month_dollars:,.0f} a month"),
    ]
    head = ["", *(f"{one.images:,} images" for one in columns)]
    lines = [head, ["---"] * len(head), *([name, *(shown(one) for one in columns)] for name, shown in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _bytes(count: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e6:.0f} MB"


def main(file: str) -> str:
    """The tables of docs/scale.md, from a file that ``featstore bench cluster --json`` wrote."""
    figures = json.loads(Path(file).read_text(encoding="utf-8"))["cluster"]
    measured = Measured.of(figures)
    return table([extrapolate(images, measured, Assumptions()) for images in (1_000_000, 1_000_000_000)])


if __name__ == "__main__":
    sys.stdout.write(main(*sys.argv[1:]) + "\n")

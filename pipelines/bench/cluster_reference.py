"""The embedded model on workers with one core each: real passes, real blocks."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import featstore.datasets
from featstore.pipelines.bench.cluster_processes import cluster
from featstore.pipelines.bench.timing import command
from featstore.pipelines.progress import Progress

IMAGES = 640
"""Ten blocks, so that two workers have the same to do."""
_TECHNIQUES = "basic,prompt,controlnet"


def reference_scaling(
    images: int, repeats: int, workers: int, folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Passes a second of 1 to ``workers`` workers with a core each.

    Models are loaded by a first extraction of a few images, which is not measured. Client, scheduler and nannies share
    the cores with the workers.

    Args:
        images: PNG files of toyhorse's pictures, turned.
        repeats: of each; medians are given.
        workers: at most; no more than there are cores.
        folder: for everything.
        progress: told of every measurement.
    """
    _as_files(images, folder / "images")
    rows = []
    for count in range(1, workers + 1):
        rates = []
        with cluster(count, 2, folder, cores=count) as (address, _):
            for repeat in range(repeats + 1):
                progress.note(f"reference on {count} workers" + (f", {repeat} of {repeats}" if repeat else ", loading"))
                report = _extract(address, folder, f"{count}-{repeat}", None if repeat else 64 * count)
                rates.append(sum(run["computed"] for run in report["runs"]) / report["seconds"])
        rate = statistics.median(rates[1:])
        rows.append({"workers": count, "images": images, "passes_per_second": rate})
    return [
        row | {"efficiency": row["passes_per_second"] / row["workers"] / rows[0]["passes_per_second"]} for row in rows
    ]


def _extract(address: str, folder: Path, name: str, limit: int | None) -> Any:
    info = featstore.datasets.resolve("toyhorse").info
    words = {
        "--dataset": f"folder:{folder / 'images'}",
        "--techniques": _TECHNIQUES,
        "--prompt": info.prompt or info.plain_prompt,
        "--model": "reference",
        "--device": "cpu",
        "--store": str(folder / f"{name}.zarr"),
        "--scheduler": address,
    } | ({} if limit is None else {"--limit": str(limit)})
    return command("extract", *(word for pair in words.items() for word in pair))


def _as_files(images: int, folder: Path) -> None:
    dataset = featstore.datasets.resolve("toyhorse")
    folder.mkdir()
    for number in range(images):
        image = dataset.image(dataset.samples[number % len(dataset.samples)].key)
        turned = np.rot90(image, number // len(dataset.samples))
        Image.fromarray(np.ascontiguousarray(turned)).save(folder / f"{number:06d}.png")

"""What limits this machine: extraction beside bare passes and the common way, the store beside others, heads, clusters.

Every figure is a ratio of sides that were measured in turn in one process; absolute rates are printed beside it.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from featstore.errors import BadRequestError, unknown_name
from featstore.pipelines.bench import cluster, gathering, heads, scale, storage
from featstore.pipelines.bench.cluster import bench_cluster
from featstore.pipelines.bench.config import BenchConfig
from featstore.pipelines.bench.extraction import bench_extract
from featstore.pipelines.bench.gathering import bench_gather
from featstore.pipelines.bench.heads import bench_head
from featstore.pipelines.bench.scale import bench_scale
from featstore.pipelines.bench.storage import bench_store
from featstore.pipelines.progress import Progress, Silent

__all__ = ["SUBJECTS", "USUAL", "BenchConfig", "bench", "tables"]

SUBJECTS = ("extract", "store", "scale", "head", "gather", "cluster")
USUAL = tuple(subject for subject in SUBJECTS if subject != "cluster")
"""What is measured unless something is asked for: a cluster takes most of an hour."""


def bench(subjects: tuple[str, ...], config: BenchConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Measure each of ``subjects``.

    Raises:
        BadRequestError: for an unknown subject.
    """
    progress = progress or Silent()
    measures: dict[str, Callable[[BenchConfig, Path], dict[str, Any]]] = {
        "extract": bench_extract,
        "store": functools.partial(bench_store, progress=progress),
        "scale": functools.partial(bench_scale, progress=progress),
        "head": bench_head,
        "gather": functools.partial(bench_gather, progress=progress),
        "cluster": functools.partial(bench_cluster, progress=progress),
    }
    for subject in subjects:
        if subject not in measures:
            raise unknown_name("benchmark", subject, measures)
    place = None if config.beside is None else config.beside.absolute().parent
    if place is not None and not (place.is_dir() and os.access(place, os.W_OK)):
        raise BadRequestError(f"folder {str(place)!r} does not exist or cannot be written", hint="name another --store")
    results: dict[str, Any] = {}
    for subject in subjects:
        progress.note(f"measuring: {subject}")
        with tempfile.TemporaryDirectory(prefix="featstore-bench-", dir=place) as folder:
            results[subject] = measures[subject](config, Path(folder))
    return results


def tables(subject: str, figures: Mapping[str, Any]) -> list[scale.Table]:
    """Those of a subject's figures that are better looked at as tables: title, column heads, rows of texts."""
    makers: dict[str, Callable[[Mapping[str, Any]], Iterable[scale.Table]]]
    makers = {"store": storage.tables, "scale": scale.tables, "head": heads.tables}
    makers |= {"gather": gathering.tables, "cluster": cluster.tables}
    return list(makers[subject](figures)) if subject in makers else []

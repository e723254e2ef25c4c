"""The scaling of a cluster as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featstore.pictures.files import figure_format, save_figure

BARS = {"efficiency": 0.95, "scheduler_ms": 5.0}
"""What is held to be good: at least, and at most."""


def save_scaling(path: Path, figures: Mapping[str, Any]) -> Path:
    """Draw what `bench_cluster` found into a PNG or SVG file: efficiency, and CPU time of the scheduler for a block.

    Raises:
        BadRequestError: for another ending.
        StorageError: if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure_format(path)
    rows = figures["workers"]
    workers = [row["workers"] for row in rows]
    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(workers, [row["efficiency"] for row in rows], "o-", label="of one worker's rate", color="tab:blue")
    left.plot(workers, [row["of_ideal"] for row in rows], "s--", label="of workers that only sleep", color="tab:gray")
    left.axhline(BARS["efficiency"], color="tab:red", linewidth=1)
    left.set_ylim(0.8, 1.05)
    left.set_ylabel("efficiency", fontsize=8)
    right.plot(workers, [row["scheduler_ms"] for row in rows], "o-", label="scheduler", color="tab:blue")
    right.plot(workers, [row["client_ms"] for row in rows], "s--", label="client", color="tab:gray")
    right.axhline(BARS["scheduler_ms"], color="tab:red", linewidth=1)
    right.set_ylim(bottom=0)
    right.set_ylabel("CPU milliseconds a block", fontsize=8)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(workers, [str(count) for count in workers])
        axes.tick_params(labelsize=7)
        axes.set_xlabel("simulated workers", fontsize=8)
        axes.legend(fontsize=7, frameon=False)
    return save_figure(path, figure)

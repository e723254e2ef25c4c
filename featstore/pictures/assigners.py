"""What assigners chose, as bars: how much of each run goes into each weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from featstore.errors import BadRequestError
from featstore.pictures.files import figure_format, save_figure
from featstore.pictures.palette import class_colours

_BAR_INCHES = 0.24
_LONGEST = 48


def save_assigners(
    path: Path, weights: Mapping[str, Sequence[Sequence[float]]], runs: Sequence[str], *, title: str = ""
) -> Path:
    """Draw the mean weights of assigners into a PNG or SVG file: a bar an assigner, cut into the shares of the runs.

    Args:
        path: the file, ``.png`` or ``.svg``; its folder is made.
        weights: by what the assigners weigh (a layer, a class), for each of n assigners the K runs' mean weights.
        runs: names of the K runs.
        title: above everything.

    Raises:
        BadRequestError: if there is nothing to draw, or a list has not K weights, or for another ending.
        StorageError: if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure_format(path)
    bars = [
        (_short(name) if len(rows) == 1 else f"{_short(name)}, {number}", row)
        for name, rows in weights.items()
        for number, row in enumerate(rows, 1)
    ]
    if not bars or any(len(row) != len(runs) for _, row in bars):
        raise BadRequestError(f"bars need the weights of {len(runs)} runs each, and one bar at the least")
    figure = Figure(figsize=(7.5, 1.1 + _BAR_INCHES * (len(bars) + len(runs) / 3)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(bars))
    left = [0.0] * len(bars)
    for number, (run, colour) in enumerate(zip(runs, class_colours(len(runs) + 1)[1:] / 255, strict=True)):
        shares = [row[number] for _, row in bars]
        axes.barh(places, shares, left=left, color=colour, label=run, height=0.8)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axes.set_yticks(places, [name for name, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("mean weight", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    figure.legend(loc="outside lower center", ncols=min(4, len(runs)), fontsize=7, frameon=False)
    if title:
        axes.set_title(title, fontsize=9)
    return save_figure(path, figure)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"..{name[-_LONGEST + 2 :]}"

"""Pictures in a grid: one row an image, one column a way to look at it."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError
from featstore.pictures.files import figure_format, save_figure
from featstore.pictures.palette import Rgb, colour_labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UInt8Array = npt.NDArray[np.uint8]

_CELL_INCHES = 1.35
_TITLE_CHARS = 16
_LEGEND_COLUMN_INCHES = 1.75
_LINE_INCHES = 0.2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One column of a grid."""

    title: str
    pictures: tuple[UInt8Array | None, ...]
    """One a row, uint8 (H, W, 3), sizes may differ; None leaves the cell empty."""


def segmentation_panels(
    images: Sequence[UInt8Array],
    truth: Sequence[UInt8Array | None],
    *,
    features: Mapping[str, Sequence[UInt8Array]],
    predictions: Mapping[str, Sequence[UInt8Array]],
) -> list[Panel]:
    """The columns that show what features make of images: input, truth, features, predictions.

    Args:
        images: inputs uint8 (H, W, 3).
        truth: label maps uint8 (h, w); None where an image has none.
        features: title to pictures uint8 (h, w, 3), e.g. a technique and `pca_pictures` of it.
        predictions: title to label maps uint8 (h, w), e.g. "prompt alone" and "all amalgamated".
    """
    panels = [
        Panel(title="input", pictures=tuple(images)),
        Panel(title="ground truth", pictures=tuple(None if mask is None else colour_labels(mask) for mask in truth)),
    ]
    panels += [Panel(title=f"features: {title}", pictures=tuple(pictures)) for title, pictures in features.items()]
    for title, masks in predictions.items():
        panels.append(Panel(title=f"predicted: {title}", pictures=tuple(colour_labels(mask) for mask in masks)))
    return panels


def _wrap(title: str, width: int = _TITLE_CHARS) -> str:
    """A title in short lines; technique expressions and paths break after ``+``, ``,``, ``:`` and ``/``."""
    breakable = re.sub(r"([+,:/])(?=\S)", "\\1\v", title)  # a vertical tab is white space that titles do not hold
    return "\n".join(line.replace("\v", "") for line in textwrap.wrap(breakable, width, replace_whitespace=False))


def save_grid(
    path: Path,
    panels: Sequence[Panel],
    *,
    row_titles: Sequence[str] = (),
    title: str = "",
    legend: Sequence[tuple[str, Rgb]] = (),
    dpi: int = 150,
) -> Path:
    """Draw a grid of pictures with titles and a legend into a PNG or SVG file.

    Args:
        path: the file, ``.png`` or ``.svg``; its folder is made.
        panels: the columns, each with one picture a row.
        row_titles: names of the rows, e.g. keys; may be empty.
        title: above everything.
        legend: (name, colour) of the classes.
        dpi: dots an inch; a column is 1.35 inches wide.

    Raises:
        BadRequestError: if there is nothing to draw, columns have different lengths, or for another ending.
        StorageError: if the file cannot be written.
    """
    figure_format(path)
    lengths = {len(panel.pictures) for panel in panels}
    if len(lengths) != 1 or lengths == {0} or (row_titles and len(row_titles) not in lengths):
        counts = ", ".join(f"{panel.title!r} {len(panel.pictures)}" for panel in panels) or "none"
        raise BadRequestError(f"columns need one picture a row each; rows: {len(row_titles)} titles, {counts}")
    (rows,) = lengths
    with warnings.catch_warnings():
        # a key may hold characters that the font lacks: they are drawn as boxes, which is no reason to fail
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = _draw(panels, rows, row_titles=row_titles, title=title, legend=legend, dpi=dpi)
        return save_figure(path, figure)


def _draw(
    panels: Sequence[Panel],
    rows: int,
    *,
    row_titles: Sequence[str],
    title: str,
    legend: Sequence[tuple[str, Rgb]],
    dpi: int,
) -> Figure:
    """The grid as a figure. Positions are in inches from the lower left corner, so that nothing overlaps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heads = [_wrap(panel.title) for panel in panels]
    margin, gap = 0.15, 0.08
    side = 0.95 if row_titles else 0.0
    width = 2 * margin + side + len(panels) * (_CELL_INCHES + gap)
    width = max(width, 4.0)
    head = 0.12 + 0.15 * max(text.count("\n") + 1 for text in heads)
    top = 0.4 if title else 0.05
    per_row = max(1, int((width - 2 * margin) // _LEGEND_COLUMN_INCHES))
    legend_rows = -(-len(legend) // per_row)
    foot = margin + (legend_rows * _LINE_INCHES + 0.1 if legend else 0.0)
    height = top + head + rows * (_CELL_INCHES + gap) + foot
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)

    def text(x: float, y: float, words: str, **style: Any) -> None:
        figure.text(x / width, y / height, words, parse_math=False, **style)  # a key may hold dollar signs

    if title:
        text(margin, height - 0.12, title, fontsize=11, fontweight="bold", va="top")
    for column, panel in enumerate(panels):
        left = margin + side + column * (_CELL_INCHES + gap)
        text(left + _CELL_INCHES / 2, height - top - head + 0.05, heads[column], fontsize=8, ha="center", va="bottom")
        for row, picture in enumerate(panel.pictures):
            if picture is None:
                continue
            bottom = height - top - head - (row + 1) * (_CELL_INCHES + gap) + gap
            box = (left / width, bottom / height, _CELL_INCHES / width, _CELL_INCHES / height)
            axes = figure.add_axes(box)
            axes.imshow(picture, interpolation="nearest", aspect="equal")
            axes.set_axis_off()
    for row, name in enumerate(row_titles):
        middle = height - top - head - row * (_CELL_INCHES + gap) - _CELL_INCHES / 2
        text(margin + side - 0.08, middle, _wrap(name, 13), fontsize=7, ha="right", va="center")
    for index, (name, (red, green, blue)) in enumerate(legend):
        left = margin + (index % per_row) * _LEGEND_COLUMN_INCHES
        bottom = foot - 0.12 - (index // per_row + 1) * _LINE_INCHES + 0.05
        chip = figure.add_axes((left / width, bottom / height, 0.16 / width, 0.13 / height))
        chip.set_facecolor((red / 255, green / 255, blue / 255))
        chip.set(xticks=[], yticks=[])
        text(left + 0.22, bottom + 0.065, name if len(name) <= 24 else f"{name[:23]}…", fontsize=7, va="center")
    return figure

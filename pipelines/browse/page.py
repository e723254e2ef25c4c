"""The page: what is picked on top, below it images beside their features, and matches of the point that was clicked."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import numpy.typing as npt
from bokeh.document import Document
from bokeh.events import Tap
from bokeh.layouts import column, row
from bokeh.models import AutocompleteInput, ColumnDataSource, Div, MultiSelect, Select
from bokeh.plotting import figure
from jinja2 import Template

from featstore.errors import FeatstoreError
from featstore.pictures import Match, heat_picture
from featstore.pipelines.browse.shelf import Book, Shelf

UInt8Array = npt.NDArray[np.uint8]

MAX_TECHNIQUES = 6
_FIRST_TECHNIQUES = 3
_SIDE_PX = 210
_PADDING = {"padding": "12px 16px", "box-sizing": "border-box"}
_BLANK = np.full((1, 1, 3), 225, dtype=np.uint8)
_HELP = "Click a point in an upper picture: its nearest match is marked below, with the cosine of every place as heat."
_TEMPLATE = """
{% extends base %}
{% block preamble %}
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{margin:0;background:#fff;color:#1c1d22;font:15px/1.45 system-ui,sans-serif}</style>
{% endblock %}
"""


class Page:
    """One visitor's page.

    Args:
        shelf: what there is to pick.
        document: bokeh's document of the visit.
    """

    def __init__(self, shelf: Shelf, document: Document) -> None:
        self._shelf = shelf
        self._book: Book = shelf.take(shelf.names[0])
        self._point: tuple[int, int] | None = None
        self._filling = False
        self._dataset = Select(title="data set", value=shelf.names[0], options=list(shelf.names), width=150)
        self._techniques = MultiSelect(title=f"techniques, {MAX_TECHNIQUES} at most", width=190, size=4)
        self._timestep = Select(title="timestep", width=90)
        self._layer = Select(title="layer", width=240)
        self._source = AutocompleteInput(title="image", width=160, **_typed())
        self._target = AutocompleteInput(title="other image", width=160, **_typed())
        self._status = Div(
            text="", disable_math=True, sizing_mode="stretch_width", name="status", styles={"font-size": "14px"}
        )
        self._grid = column(children=[], name="pictures", sizing_mode="stretch_width", styles={"overflow-x": "auto"})
        document.title = "featstore browse"
        document.template = Template(_TEMPLATE)
        picks = row(
            self._dataset,
            self._techniques,
            self._timestep,
            self._layer,
            self._source,
            self._target,
            sizing_mode="stretch_width",
            styles={"flex-wrap": "wrap", "gap": "6px"},
        )
        document.add_root(column(picks, self._status, self._grid, sizing_mode="stretch_width", styles=_PADDING))
        self._fill()
        self._dataset.on_change("value", lambda attr, old, new: self._take(new))
        for widget in (self._techniques, self._timestep):
            widget.on_change("value", lambda attr, old, new: self._repick())
        for widget in (self._layer, self._source, self._target):
            widget.on_change("value", lambda attr, old, new: self._draw())
        self._draw()

    def _take(self, name: str) -> None:
        self._book = self._shelf.take(name)
        self._fill()
        self._draw()

    def _fill(self) -> None:
        """Offer what the data set has."""
        self._filling = True
        book = self._book
        timestep = book.usual_timestep
        here = [name for name in book.techniques if (name, timestep) in book.runs]
        self._techniques.options = list(book.techniques)
        self._techniques.value = here[:_FIRST_TECHNIQUES]
        self._timestep.options = [str(one) for one in book.timesteps]
        self._timestep.value = str(timestep)
        self._source.completions = self._target.completions = book.keys()
        self._source.value, self._target.value = book.first_pair()
        self._offer_layers()
        self._filling = False

    def _offer_layers(self) -> None:
        runs = self._book.chosen(self._picked(), int(self._timestep.value))
        layers = self._book.layers(runs)
        self._layer.options = list(layers)
        if self._layer.value not in layers:
            self._layer.value = self._book.usual_layer(runs)

    def _picked(self) -> list[str]:
        return list(self._techniques.value)[:MAX_TECHNIQUES]

    def _repick(self) -> None:
        if not self._filling:
            filling, self._filling = self._filling, True
            self._offer_layers()
            self._filling = filling
            self._draw()

    def _draw(self) -> None:
        """Pictures of what is picked; the point stays where it is as long as its image stays."""
        if self._filling:
            return
        try:
            self._show()
        except FeatstoreError as error:  # the page says it, and stays as it is
            self._say(str(error), error.hint)

    def _show(self) -> None:
        book, layer = self._book, self._layer.value
        keys = (self._source.value, self._target.value)
        runs = book.chosen(self._picked(), int(self._timestep.value))
        if not runs or not layer:
            self._grid.children = []
            self._say("nothing fits: pick techniques that have this timestep and a layer in common")
            return
        seen = book.view(runs, layer, keys)
        first = next(iter(runs.values()))
        sizes = [book.size(key, first) for key in keys]
        if self._point is not None and not (self._point[0] < sizes[0][0] and self._point[1] < sizes[0][1]):
            self._point = None
        matches: dict[str, Match | None] = {}
        if (point := self._point) is not None:
            matches = {name: book.match(run, layer, keys[0], point, keys[1]) for name, run in runs.items()}
        target = book.picture(keys[1])
        columns = [column(*self._images(keys, sizes), width=_SIDE_PX + 16)] if book.has_images else []
        for name, (upper, lower) in seen.items():
            match = matches.get(name)
            cells = [self._plot(name, upper, sizes[0], point, taps=True)]
            cells.append(self._plot(keys[1], lower, sizes[1], None if match is None else (match.y, match.x)))
            if match is not None:
                low = float(np.percentile(match.heat, 2))
                heat = heat_picture(match.heat, low=low, high=match.cosine, image=target)
                cells.append(self._plot(f"cosine {match.cosine:.3f}", heat, sizes[1], (match.y, match.x)))
            columns.append(column(*cells, width=_SIDE_PX + 16))
        self._grid.children = [row(*columns, styles={"flex-wrap": "nowrap"})]
        if point is None:
            self._say(_HELP)
        else:
            self._say_matches(keys, point, matches)

    def _images(self, keys: tuple[str, str], sizes: list[tuple[int, int]]) -> list[Any]:
        source, target = (self._book.picture(key) for key in keys)
        return [
            self._plot(keys[0], source, sizes[0], self._point, taps=True),
            self._plot(keys[1], target, sizes[1], None),
        ]

    def _plot(
        self,
        title: str,
        picture: UInt8Array | None,
        size: tuple[int, int],
        mark: tuple[int, int] | None,
        *,
        taps: bool = False,
    ) -> Any:
        """A picture with the pixels of its image as coordinates, y downwards."""
        height, width = size
        scale = _SIDE_PX / max(size)
        plot = figure(
            title=_plain(title) if picture is not None else f"{_plain(title)}: none",
            width=max(60, round(width * scale)),
            height=max(60, round(height * scale)) + 26,
            x_range=(0, width),
            y_range=(height, 0),
            tools="",
            toolbar_location=None,
            min_border=0,
            outline_line_color=None,
            name="upper" if taps else "lower",
        )
        plot.axis.visible = False
        plot.grid.visible = False
        plot.title.text_font_size = "12px"
        plot.image_rgba(image=[_rgba(_BLANK if picture is None else picture)], x=0, y=0, dw=width, dh=height)
        if mark is not None:
            at = {"x": [mark[1] + 0.5], "y": [mark[0] + 0.5]}
            plot.scatter(
                source=ColumnDataSource(at), marker="circle", size=13, line_color="white", line_width=4, fill_alpha=0
            )
            plot.scatter(
                source=ColumnDataSource(at), marker="circle", size=13, line_color="#e8123c", line_width=2, fill_alpha=0
            )
        if taps:
            plot.on_event(Tap, lambda event: self._tapped(event, size))
        return plot

    def _tapped(self, event: Any, size: tuple[int, int]) -> None:
        y, x = int(np.floor(event.y)), int(np.floor(event.x))
        if 0 <= y < size[0] and 0 <= x < size[1]:
            self._point = y, x
            self._draw()

    def _say_matches(self, keys: tuple[str, str], point: tuple[int, int], matches: dict[str, Match | None]) -> None:
        lines = [f"Point x {point[1]}, y {point[0]} of {keys[0]} is found in {keys[1]} at"]
        for name, match in matches.items():
            where = "no features" if match is None else f"x {match.x}, y {match.y}, cosine {match.cosine:.3f}"
            lines.append(f"{name}: {where}")
        self._say(lines[0], "; ".join(lines[1:]))

    def _say(self, text: str, more: str | None = None) -> None:
        below = f"<br><b>{html.escape(more)}</b>" if more else ""
        self._status.text = f"{html.escape(text)}{below}"


def _typed() -> dict[str, Any]:
    return {
        "min_characters": 0,
        "restrict": False,
        "case_sensitive": False,
        "search_strategy": "includes",
        "max_completions": 12,
    }


def _plain(text: str) -> str:
    """A title that is never taken for a formula, and stays in its line."""
    text = text.replace("$", "＄").replace("\\", "＼")
    return text if len(text) <= 30 else f"..{text[-28:]}"


def _rgba(picture: UInt8Array) -> npt.NDArray[np.uint32]:
    """Bytes R, G, B, A in each element, as bokeh takes pictures; the first row is the upper one, for y goes down."""
    opaque = np.full((*picture.shape[:2], 1), 255, dtype=np.uint8)
    whole = np.ascontiguousarray(np.concatenate([picture, opaque], axis=2))
    pixels: npt.NDArray[np.uint32] = whole.view(np.uint32)[:, :, 0]
    return pixels

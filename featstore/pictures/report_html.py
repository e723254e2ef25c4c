"""Sections of a report as HTML; everything that comes from outside is escaped."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError
from featstore.pictures.files import png_bytes
from featstore.pictures.grid import Panel
from featstore.pictures.report_content import (
    Cell,
    Details,
    IntervalTable,
    PanelTable,
    Plate,
    ScoreTable,
    Section,
    Table,
)


def body(section: Section) -> str:
    """What stands under a section's title."""
    match section:
        case ScoreTable():
            return _scores(section)
        case Table():
            return _table(section.columns, section.rows)
        case PanelTable():
            return _panels(section)
        case IntervalTable():
            return _intervals(section)
        case Plate():
            return f'<p class="plate">{_image(section.words, section.picture)}</p>'
        case Details():
            return _details(section)


def text(value: str) -> str:
    """Escaped for HTML; names that are not UTF-8 lose the odd bytes."""
    return html.escape(value.encode("utf-8", "replace").decode())


def _name(value: str) -> str:
    """A technique expression, path or name, escaped, that breaks after its ``+``, ``,``, ``:`` and ``/``."""
    return "<wbr>".join(text(piece) for piece in re.split(r"(?<=[+,:/])(?=\S)", value))


def _scores(table: ScoreTable) -> str:
    """Bars on one scale from 0 to a little above the best, with the deviation as a whisker."""
    reach = max((score.mean + (score.std or 0) for score in table.scores if math.isfinite(score.mean)), default=0)
    top = min(1.0, reach * 1.08) or 1.0
    rows = []
    for score in table.scores:
        if not math.isfinite(score.mean):
            value, bar = "–", ""
        else:
            spread = "" if score.std is None else f' <span class="std">± {100 * score.std:.1f}</span>'
            value = f"<b>{100 * score.mean:.1f}</b>{spread}"
            bar = f'<span class="fill" style="width:{_percent(score.mean / top)}"></span>'
            if score.std:
                low, high = max(0.0, score.mean - score.std), min(top, score.mean + score.std)
                place = f"left:{_percent(low / top)};width:{_percent((high - low) / top)}"
                bar += f'<span class="whisker" style="{place}"></span>'
        note = f"<small>{text(score.note)}</small>" if score.note else ""
        rows.append(
            f'<tr{" class=best" if score.highlight else ""}><th scope="row">{_name(score.name)}{note}</th>'
            f'<td class="value">{value}</td><td class="bar"><span class="track">{bar}</span></td></tr>'
        )
    return (
        '<table class="scores"><thead><tr><th scope="col"></th>'
        f'<th scope="col" class="value">{text(table.metric)}, %</th><th></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


def _cell(value: Cell) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return '<td class="value">–</td>'
    if isinstance(value, str):
        return f"<td>{_name(value)}</td>"
    return f'<td class="value">{value:,}</td>' if isinstance(value, int) else f'<td class="value">{value:.3f}</td>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    numeric = [all(not isinstance(row[index], str) for row in rows) for index in range(len(columns))]
    head = "".join(
        f'<th scope="col"{" class=value" if right else ""}>{text(name)}</th>'
        for name, right in zip(columns, numeric, strict=True)
    )
    body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _panels(table: PanelTable) -> str:
    lengths = {len(panel.pictures) for panel in table.panels}
    if len(lengths) != 1 or (table.row_titles and len(table.row_titles) not in lengths):
        raise BadRequestError(f"pictures {table.title!r}: columns need one picture a row each, not {sorted(lengths)}")
    (count,) = lengths
    corner = '<th scope="col"></th>' if table.row_titles else ""
    head = corner + "".join(f'<th scope="col">{_name(panel.title)}</th>' for panel in table.panels)
    rows = []
    for row in range(count):
        name = f'<th scope="row">{_name(table.row_titles[row])}</th>' if table.row_titles else ""
        cells = "".join(_picture(panel, row, table.row_titles) for panel in table.panels)
        rows.append(f"<tr>{name}{cells}</tr>")
    chips = "".join(
        f'<li><span class="chip" style="background:rgb({red},{green},{blue})"></span>{text(name)}</li>'
        for name, (red, green, blue) in table.legend
    )
    legend = f'<ul class="legend">{chips}</ul>' if chips else ""
    return (
        f'<div class="wide"><table class="pictures"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{legend}"
    )


def _picture(panel: Panel, row: int, row_titles: Sequence[str]) -> str:
    picture = panel.pictures[row]
    if picture is None:
        return "<td></td>"
    words = f"{panel.title}: {row_titles[row]}" if row_titles else panel.title
    return f"<td>{_image(words, picture)}</td>"


def _image(words: str, picture: npt.NDArray[np.uint8]) -> str:
    data = base64.b64encode(png_bytes(picture)).decode()
    return f'<img alt="{text(words)}" src="data:image/png;base64,{data}">'


def _intervals(table: IntervalTable) -> str:
    """Dots on one axis that takes in zero, each on the line of its interval."""
    ends = [0.0]
    for one in table.intervals:
        ends += [end for end in (one.value, one.low, one.high) if end is not None and math.isfinite(end)]
    low, high = min(ends), max(ends)
    margin = 0.04 * (high - low) or 1.0
    low, span = low - margin, high - low + 2 * margin

    def place(value: float) -> float:
        return (value - low) / span

    rows = []
    for one in table.intervals:
        value, line = "–", ""
        if math.isfinite(one.value):
            value = f"<b>{one.value:.3f}</b>"
            if one.low is not None and one.high is not None and math.isfinite(one.low) and math.isfinite(one.high):
                value += f' <span class="std">{one.low:.3f} to {one.high:.3f}</span>'
                width = _percent(place(one.high) - place(one.low))
                line = f'<span class="line" style="left:{_percent(place(one.low))};width:{width}"></span>'
            line += f'<span class="dot" style="left:{_percent(place(one.value))}"></span>'
        note = f"<small>{text(one.note)}</small>" if one.note else ""
        zero = f'<span class="zero" style="left:{_percent(place(0))}"></span>'
        rows.append(
            f'<tr><th scope="row">{_name(one.name)}{note}</th><td class="value">{value}</td>'
            f'<td class="bar"><span class="track">{zero}{line}</span></td></tr>'
        )
    return (
        '<table class="scores intervals"><thead><tr><th scope="col"></th>'
        f'<th scope="col" class="value">{text(table.metric)}</th><th></th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _details(section: Details) -> str:
    return "".join(
        f"<details><summary>{_name(line)}</summary><pre>{text(long)}</pre></details>" for line, long in section.entries
    )

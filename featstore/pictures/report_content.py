"""What a report is made of: its sections as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError
from featstore.pictures.grid import Panel
from featstore.pictures.palette import Rgb

Cell = str | int | float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One line of a table of scores."""

    name: str
    """What was scored, e.g. ``basic`` or ``basic, prompt, controlnet (amalgamated)``."""
    mean: float
    """0..1; shown in percent."""
    std: float | None = None
    """Standard deviation over the splits, 0..1; None: there was one split."""
    note: str = ""
    highlight: bool = False
    """Stands out, e.g. the amalgamated head."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTable:
    """Scores by one measure, drawn as bars."""

    title: str
    metric: str
    """Name of the measure, e.g. ``mIoU``."""
    scores: tuple[Score, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Any other table: strings as they are, numbers to three decimals, None as a dash."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse rows of another length than the head."""
        if odd := [row for row in self.rows if len(row) != len(self.columns)]:
            raise BadRequestError(f"table {self.title!r} has {len(self.columns)} columns, a row {len(odd[0])}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PanelTable:
    """Pictures in a grid, as in `save_grid`."""

    title: str
    panels: tuple[Panel, ...]
    row_titles: tuple[str, ...] = ()
    legend: tuple[tuple[str, Rgb], ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """One line of a table of intervals."""

    name: str
    value: float
    low: float | None = None
    """Lower end of the interval; None: it has none."""
    high: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IntervalTable:
    """Values that may be negative, with their intervals, drawn along one axis on which zero is marked."""

    title: str
    metric: str
    """What the values are, e.g. ``score`` or ``difference in mIoU``."""
    intervals: tuple[Interval, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plate:
    """One wide picture, such as a plot."""

    title: str
    picture: npt.NDArray[np.uint8]
    """(H, W, 3)."""
    words: str
    """What it shows, for those who do not see it."""
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """Long texts that are folded away: a line each, which opens."""

    title: str
    entries: tuple[tuple[str, str], ...]
    """(the line, the text below it); shown as they are."""
    note: str = ""


Section = ScoreTable | Table | PanelTable | IntervalTable | Plate | Details


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that the page shows, in its order."""

    title: str
    lead: str
    """A sentence or two under the title: what this is and what came out."""
    sections: tuple[Section, ...]
    made: Mapping[str, str]
    """How it was made: commands, versions, machine, date; shown last, as given."""

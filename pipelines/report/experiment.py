"""What a report says of an experiment: the scores of its settings, and how they compare."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from featstore.errors import BadRequestError
from featstore.pictures import Details, Interval, IntervalTable, Plate, Score, ScoreTable, Section, Table
from featstore.pipelines.report.documents import (
    interval,
    mapping,
    metric_name,
    number,
    objects,
    pretty,
    read_json,
    words,
)

_log = logging.getLogger(__name__)

_HINT = "make one with: featstore experiment FILE --out DIR"
_MAX_PICTURE_PIXELS = 40_000_000


def read_experiment(folder: Path) -> Mapping[str, Any]:
    """``results.json`` of an experiment's folder.

    Raises:
        NotFoundError: if it is not there.
        BadRequestError: if it lists no settings.
    """
    path = folder / "results.json"
    document = read_json(path, what="experiment", hint=_HINT)
    if not objects(document.get("settings")):
        raise BadRequestError(f"experiment {str(path)!r} lists no settings", hint=_HINT)
    return document


def experiment_sections(folder: Path, document: Mapping[str, Any]) -> tuple[list[Section], str]:
    """Sections on an experiment, and the sentence that leads to them."""
    title = words(document.get("title") or folder.resolve().name)
    settings = objects(document.get("settings"))
    sections: list[Section] = []
    for metric in dict.fromkeys(name for setting in settings for name in mapping(setting.get("metrics"))):
        scores = []
        for setting in settings:
            value = mapping(mapping(setting.get("metrics")).get(metric))
            if (mean := number(value.get("mean"))) is not None:
                scores.append(Score(name=words(setting.get("name")), mean=mean, std=number(value.get("std"))))
        note = "Mean and deviation over splits."
        name = metric_name(metric)
        sections.append(ScoreTable(title=f"{title}: {name}", metric=name, scores=tuple(scores), note=note))
    sections += [*_comparisons(title, document), *_correlations(title, document)]
    if (plot := _plot(folder / "results.png")) is not None:
        sections.append(Plate(title=f"{title}: plot", picture=plot, words=f"plot of {title}"))
    rest = {key: value for key, value in document.items() if key not in ("settings", "comparisons")}
    entries = [(words(setting.get("name")), pretty(setting)) for setting in settings]
    sections.append(Details(title=f"{title}: settings", entries=(("the experiment", pretty(rest)), *entries)))
    asked, made = number(document.get("passes_asked")), number(document.get("passes_made"))
    lead = f"Experiment: {title}, {len(settings)} {'setting' if len(settings) == 1 else 'settings'}."
    if asked and made is not None:
        lead += f" {asked:,.0f} passes asked for, {made:,.0f} made: {100 * (1 - made / asked):.0f} % saved."
    return sections, lead


def _comparisons(title: str, document: Mapping[str, Any]) -> list[Section]:
    by_metric: dict[str, list[Interval]] = {}
    for one in objects(document.get("comparisons")):
        low, high = interval(one.get("ci95"))
        difference, chance = number(one.get("difference")), number(one.get("p"))
        by_metric.setdefault(words(one.get("metric")), []).append(
            Interval(
                name=f"{words(one.get('a'))} against {words(one.get('b'))}",
                value=math.nan if difference is None else difference,
                low=low,
                high=high,
                note="" if chance is None else f"p = {chance:.3g}",
            )
        )
    return [
        IntervalTable(
            title=f"{title}: differences in {metric_name(metric)}",
            metric=f"difference in {metric_name(metric)}",
            intervals=tuple(intervals),
            note="Paired over splits, with the 95 % interval; above zero the first is better.",
        )
        for metric, intervals in by_metric.items()
    ]


def _correlations(title: str, document: Mapping[str, Any]) -> list[Section]:
    rows = tuple(
        (words(one.get("of")), number(one.get("rho")), number(one.get("p")), number(one.get("settings")))
        for one in objects(mapping(document.get("correlation")).get("correlations"))
    )
    note = "Over settings; p is the chance of one as strong where there is none."
    columns = ("of", "Spearman's rho", "p", "settings")
    return [Table(title=f"{title}: rank correlations", columns=columns, rows=rows, note=note)] if rows else []


def _plot(path: Path) -> np.ndarray | None:
    """The plot beside the results as uint8 (H, W, 3); None if there is none that can be shown."""
    from PIL import Image

    if not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            if image.width * image.height > _MAX_PICTURE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} px")  # noqa: TRY301 - said below like the others
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        _log.warning("%s is left out: %s", path, error)
        return None

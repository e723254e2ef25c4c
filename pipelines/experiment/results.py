"""What an experiment gave, as files: JSON, a table for spreadsheets, a table for documents, a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.pictures.files import publish, save_figure
from featstore.pipelines.experiment.running import Correlated, ExperimentResult, Outcome
from featstore.pipelines.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JSON, CSV, MARKDOWN, PICTURE = "results.json", "results.csv", "results.md", "results.png"

_ROW_INCHES = 0.21
_COLOUR, _FAINT = "#2b5c8a", "#9db8cf"


def write_results(result: ExperimentResult, folder: Path) -> list[Path]:
    """Write all four files.

    Raises:
        StorageError: if that is not possible.
    """
    text = json.dumps(result.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    written = [
        publish(folder / JSON, text.encode() + b"\n"),
        publish(folder / CSV, _csv(result).encode()),
        publish(folder / MARKDOWN, markdown(result).encode()),
    ]
    return [*written, save_picture(result, folder / PICTURE)]


def first_metric(outcome: Outcome) -> str:
    """The metric that a setting's task is compared by."""
    return TASKS[outcome.planned.training.task].metrics[0]


def saved_line(asked: int, made: int) -> str:
    """How many passes extracting once saves."""
    share = f": {100 * (asked - made) / asked:.0f} % saved" if asked else ""
    return f"{asked:,} passes asked for, {made:,} made{share}"


def markdown(result: ExperimentResult) -> str:
    """Tables of settings, comparisons and correlations, each where there are any; values in percent."""
    experiment = result.plan.config.experiment
    parts = [f"{saved_line(result.plan.passes_asked, result.plan.passes_made)}; {_trained(result)}."]
    rows = [
        (
            one.planned.setting.name,
            first_metric(one),
            f"{100 * one.scores.metrics[first_metric(one)].mean:.2f}",
            f"{100 * one.scores.metrics[first_metric(one)].std:.2f}",
            f"{len(one.scores.metrics[first_metric(one)].splits)}",
        )
        for one in result.outcomes
    ]
    parts.append(
        _table(
            (experiment.axes[0] if len(experiment.axes) == 1 else "setting", "metric", "mean %", "deviation", "splits"),
            rows,
        )
    )
    if result.compared:
        differences = [
            (
                one.a,
                one.b,
                one.metric,
                f"{100 * one.found.difference:+.2f}",
                "-" if one.found.ci95 is None else f"{100 * one.found.ci95[0]:+.2f} .. {100 * one.found.ci95[1]:+.2f}",
                _p(one.found.p),
            )
            for one in result.compared
        ]
        parts.append(_table(("setting", "over", "metric", "points", "95 % interval", "p"), differences))
    if result.correlated is not None:
        parts += _correlation_tables(result.correlated)
    return "\n\n".join(parts) + "\n"


def _correlation_tables(found: Correlated) -> list[str]:
    rows = [
        (
            row.setting,
            *(
                f"{value:+.3f}"
                for value in (row.score, row.score_gain, row.own_score, row.pattern_score, row.pattern_gain)
            ),
            f"{100 * row.value:.2f}",
            f"{100 * row.gain:+.2f}",
        )
        for row in found.rows
    ]
    pairs = [
        (name, "-" if one.rho is None else f"{one.rho:+.2f}", _p(one.p), str(one.settings))
        for name, one in found.found.items()
    ]
    return [
        _table(
            (
                "setting",
                "score",
                "gain in score",
                "own score",
                "score of patterns",
                "gain in it",
                f"{found.metric} %",
                "gain in points",
            ),
            rows,
        ),
        _table(("Spearman's coefficient of", "rho", "p", "settings"), pairs),
    ]


def _trained(result: ExperimentResult) -> str:
    heads = sorted(
        {
            f"{one.planned.training.ensemble} members, "
            + ("until the loss stops improving" if (s := one.planned.training.max_steps) is None else f"{s:,} steps")
            for one in result.outcomes
        }
    )
    return f"heads of {' or '.join(heads)}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def _csv(result: ExperimentResult) -> str:
    """A line a setting, metric and split."""
    axes = result.plan.config.experiment.axes
    stream = io.StringIO(newline="")
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(["name", *axes, "metric", "split", "value"])
    for one in result.outcomes:
        places = [one.planned.setting.axes.get(axis, "") for axis in axes]
        for metric, value in one.scores.metrics.items():
            table.writerows(
                [one.planned.setting.name, *places, metric, split, score] for split, score in enumerate(value.splits)
            )
    return stream.getvalue()


def save_picture(result: ExperimentResult, path: Path) -> Path:
    """Draw every split of every setting, and every difference with its interval.

    Raises:
        StorageError: if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if result.compared else 1
    longest = max(len(result.outcomes), len(result.compared))
    figure = Figure(figsize=(5.2 * columns, 1.4 + _ROW_INCHES * longest), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    figure.suptitle(result.plan.config.experiment.title, fontsize=9)
    _draw_scores(panels[0], result.outcomes)
    if result.compared:
        _draw_differences(panels[1], result)
    return save_figure(path, figure)


def _draw_scores(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    for place, one in enumerate(outcomes):
        metric = one.scores.metrics[first_metric(one)]
        axes.plot([100 * value for value in metric.splits], [place] * len(metric.splits), ".", color=_FAINT)
        axes.plot([100 * metric.mean], [place], "|", color=_COLOUR, markersize=9, markeredgewidth=2)
    _name(axes, [one.planned.setting.name for one in outcomes])
    axes.set_xlabel(f"{', '.join(dict.fromkeys(map(first_metric, outcomes)))} in % (dots: splits)", fontsize=8)


def _draw_differences(axes: Axes, result: ExperimentResult) -> None:
    for place, one in enumerate(result.compared):
        if one.found.ci95 is not None:
            axes.plot([100 * edge for edge in one.found.ci95], [place, place], "-", color=_COLOUR, linewidth=1.5)
        axes.plot([100 * one.found.difference], [place], "o", color=_COLOUR, markersize=3.5)
    axes.axvline(0, color="#888888", linewidth=0.8)
    _name(axes, [f"{one.a} - {one.b}" for one in result.compared])
    axes.set_xlabel("difference in points, 95 % interval", fontsize=8)


def _name(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [name if len(name) <= 56 else f"{name[:54]}.." for name in names], fontsize=6)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", linewidth=0.3)

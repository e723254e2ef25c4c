"""What people see: results on standard output; plans, progress and errors on standard error.

Names of images, paths and messages may hold anything, so nothing that comes from outside is ever
read as markup: texts are styled as objects, and characters that do not print are shown escaped.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from featstore.errors import FeatstoreError

P = ParamSpec("P")
R = TypeVar("R")

FAILED = 1
INTERRUPTED = 130

_UNITS = ("B", "kB", "MB", "GB", "TB")
_LINE_EVERY_SECONDS = 30.0
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""A command line that does not parse; some versions of typer bring their own copy of click, with no public name."""
_LEAVES = (typer.Exit, typer.Abort, USAGE_ERROR)

out = Console(highlight=False, soft_wrap=True, emoji=False, markup=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, markup=False)


def say(*parts: str | tuple[str, str], to: Console | None = None) -> None:
    """Print one line, on standard error unless told otherwise.

    Args:
        parts: texts, or pairs of a text and a style.
        to: `out` for what is a result.
    """
    shown = [_printable(part) if isinstance(part, str) else (_printable(part[0]), part[1]) for part in parts]
    (to or err).print(Text.assemble(*shown))


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_json(value: Mapping[str, Any]) -> None:
    """The one JSON object of ``--json``; what JSON cannot say (NaN, infinities) is null."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=not unicode, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on standard output; columns of figures are right-aligned. Folded to fit a terminal, but never a pipe."""
    table = Table(
        title=Text(_printable(title)),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for index, column in enumerate(columns):
        figures = bool(rows) and all(_is_figure(str(row[index])) for row in rows)
        table.add_column(column, justify="right" if figures else "left", header_style="dim", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_printable(str(value))) for value in row))
    if out.is_terminal:
        out.print(table)
    else:
        widest = Measurement.get(out, out.options.update(width=1 << 16), table).maximum
        Console(file=out.file, width=widest, highlight=False, emoji=False, markup=False).print(table)


def _is_figure(text: str) -> bool:
    return bool(text) and text[0] in "0123456789-+" and text[-1] not in "x"


def human_bytes(size_bytes: float) -> str:
    """A size in the decimal units that disks are sold in."""
    power = 0
    while power < len(_UNITS) - 1 and size_bytes >= 1000:
        size_bytes /= 1000
        power += 1
    return f"{size_bytes:.1f} {_UNITS[power]}" if power else f"{size_bytes:.0f} {_UNITS[0]}"


def human_seconds(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def report_error(kind: str, message: str, hint: str | None, *, as_json: bool) -> None:
    """Print an error's line and hint on standard error and, for ``--json``, as the object on standard output."""
    if as_json:
        print_json({"error": {"kind": kind, "message": message, "hint": hint}})
    say(("error: ", "bold red"), message)
    if hint:
        say(("hint: ", "dim"), hint)


def handled(command: Callable[P, R]) -> Callable[P, R]:
    """Turn what is raised into one line and an exit status; ``--debug`` prints the traceback before it."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        as_json, debug = bool(kwargs.get("as_json")), bool(kwargs.get("debug"))

        def leave(error: BaseException, message: str, hint: str | None, status: int) -> NoReturn:
            if debug:
                err.print(Text("".join(traceback.format_exception(error))), end="")
            report_error(type(error).__name__, message, hint, as_json=as_json)
            raise typer.Exit(status) from None

        try:
            return command(*args, **kwargs)
        except FeatstoreError as error:
            leave(error, str(error), error.hint, error.exit_code)
        except KeyboardInterrupt as error:
            hint = str(error) or "what was committed stays; the same command goes on from there"
            leave(error, "interrupted", hint, INTERRUPTED)
        except _LEAVES:
            raise
        except BrokenPipeError:
            raise
        except Exception as error:  # noqa: BLE001 - a defect of ours; people get a line, --debug the rest
            message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            leave(error, message, None if debug else "this was not foreseen; --debug shows where it happened", FAILED)

    return wrapper


class Bar:
    """Progress on standard error: a bar with rate and time left on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._lines: _Lines | None = None
        self._task: TaskID | None = None

    def start(self, title: str, total: int, unit: str) -> None:
        """Show a bar of ``total`` steps."""
        self.stop()
        if not err.is_interactive:
            self._lines = _Lines(title, total, unit)
            return
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *_amount_columns(unit),
            _Rate(unit),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(),
            console=err,
            transient=False,
        )
        self._progress.start()
        self._task = self._progress.add_task(title, total=total)

    def advance(self, steps: int = 1) -> None:
        """Move the bar."""
        if self._lines is not None:
            self._lines.advance(steps)
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, steps)

    def describe(self, title: str) -> None:
        """Change what stands before the bar."""
        if self._lines is not None:
            self._lines.title = title
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=title)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        say(text)

    def stop(self) -> None:
        """Leave the bar as it stands."""
        if self._lines is not None:
            self._lines.stop()
            self._lines = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


BYTES = "bytes"
"""The unit of stages that are counted in bytes, which are shown as people say them."""


def _amount(count: float, unit: str) -> str:
    return human_bytes(count) if unit == BYTES else f"{count:.0f}"


def _amount_columns(unit: str) -> tuple[ProgressColumn, ...]:
    if unit == BYTES:
        return (_Amount(),)
    return (MofNCompleteColumn(), TextColumn(unit, style="dim", markup=False))


class _Amount(ProgressColumn):
    """Bytes of bytes."""

    def render(self, task: Task) -> Text:
        return Text(f"{human_bytes(task.completed)} of {human_bytes(task.total or 0)}")


class _Lines:
    """Progress for logs and pipes: a line now and then, and one at the end."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self._total, self._unit = title, total, unit
        self._done = 0
        self._begin = self._said = time.monotonic()

    def advance(self, steps: int) -> None:
        self._done += steps
        now = time.monotonic()
        if self._done < self._total and now - self._said >= _LINE_EVERY_SECONDS:
            self._said = now
            left = (now - self._begin) / self._done * (self._total - self._done) if self._done else None
            self._say(now, "" if left is None else f", about {human_seconds(left)} left")

    def stop(self) -> None:
        self._say(time.monotonic(), "")

    def _say(self, now: float, rest: str) -> None:
        passed = now - self._begin
        done, total = _amount(self._done, self._unit), _amount(self._total, self._unit)
        unit = "" if self._unit == BYTES else f" {self._unit}"
        say(f"{self.title}: {done} of {total}{unit} in {human_seconds(passed)}{rest}")


class _Rate(ProgressColumn):
    """Steps a second since the start."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time or task.elapsed
        speed = task.completed / elapsed if elapsed else 0.0
        shown = human_bytes(speed) if self._unit == BYTES else f"{speed:.1f} {self._unit}"
        return Text(f"{shown}/s" if speed else "", style="cyan")

"""What a report says of a gate: which techniques suppress content shift, and bring a reconstruction closer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featstore.errors import BadRequestError
from featstore.pictures import Details, Interval, IntervalTable, Section, Table
from featstore.pipelines.report.documents import interval, number, objects, pretty, read_json, words

_HINT = "make one with: featstore gate --dataset D --techniques T --out DIR"
_SHOWN = (
    "score",
    "score_ci95",
    "pattern_score",
    "pattern_score_ci95",
    "ssim",
    "psnr_db",
    "closer_than_reference",
    "suppresses",
)
_COSTS = {
    "verdict": "verdict",
    "seconds_per_pass": "seconds a pass",
    "seconds_a_pass": "seconds a pass",
    "bytes_per_image": "bytes an image",
    "bytes_an_image": "bytes an image",
}
"""Further keys that are worth a column where they are there."""


def read_gate(path: Path) -> Mapping[str, Any]:
    """The file that a gate wrote, or the folder that it is in.

    Raises:
        NotFoundError: if it is not there.
        BadRequestError: if it is no gate's.
    """
    path = path / "gate.json" if path.is_dir() else path
    document = read_json(path, what="gate", hint=_HINT)
    if not objects(document.get("techniques")):
        raise BadRequestError(f"gate {str(path)!r} lists no techniques", hint=_HINT)
    return document


def gate_sections(document: Mapping[str, Any]) -> tuple[list[Section], str]:
    """Sections on a gate, and the sentence that leads to them."""
    techniques = objects(document.get("techniques"))
    anchor = words(document.get("anchor"))
    extra = [(key, title) for key, title in _COSTS.items() if any(key in one for one in techniques)]
    columns = ("technique", "SSIM", "PSNR, dB", "closer than the reference", "suppresses content shift")
    rows = tuple(
        (
            _name(one),
            number(one.get("ssim")),
            number(one.get("psnr_db")),
            words(one.get("closer_than_reference")),
            words(one.get("suppresses")),
            *(_cell(one.get(key)) for key, _ in extra),
        )
        for one in techniques
    )
    sections: list[Section] = [
        *_scores(techniques, anchor=anchor),
        Table(
            title="Gate: techniques",
            columns=(*columns, *(title for _, title in extra)),
            rows=rows,
            note="SSIM and PSNR compare Img2Img at high strength with the input.",
        ),
    ]
    if (command := document.get("extract_command")) and isinstance(command, str):
        sections.append(Details(title="Gate: what to extract", entries=(("the command that it proposes", command),)))
    rest = {key: value for key, value in document.items() if key not in ("techniques", "extract_command")}
    odd = [{k: v for k, v in one.items() if k not in _SHOWN} for one in techniques]
    sections.append(
        Details(title="Gate: all that was measured", entries=(("as JSON", pretty({**rest, "techniques": odd})),))
    )
    helping = [_name(one) for one in techniques if one.get("suppresses") is True]
    found = (
        f"content shift is suppressed by {', '.join(helping)}" if helping else "no technique suppresses content shift"
    )
    lead = f"Gate: {found}."
    return sections, lead


def _scores(techniques: Sequence[Mapping[str, Any]], *, anchor: str) -> list[IntervalTable]:
    """The score of patterns, which decides, and the paper's, each where the gate measured it."""
    note = f"1: features like those at t = 0; 0: as far from them as the anchor, {anchor}. With the 95 % interval over"
    tables = []
    for key, title, what in (
        ("pattern_score", "Gate: content shift, where features change", "Decides whether a technique suppresses it."),
        ("score", "Gate: content shift, how strongly features change", "The paper's score."),
    ):
        intervals = []
        for one in techniques:
            score, (low, high) = number(one.get(key)), interval(one.get(f"{key}_ci95"))
            value = math.nan if score is None else score
            intervals.append(Interval(name=_name(one), value=value, low=low, high=high))
        if any(key in one for one in techniques):
            tables.append(
                IntervalTable(title=title, metric="score", intervals=tuple(intervals), note=f"{note} images. {what}")
            )
    return tables


def _name(technique: Mapping[str, Any]) -> str:
    """What a technique is called in tables: with its timestep where a gate says it, as one gate may look at several."""
    name, timestep = words(technique.get("technique")), technique.get("timestep")
    return name if timestep is None else f"{name}, t = {timestep}"


def _cell(value: object) -> str | int | float | None:
    if isinstance(value, str | None):
        return value
    return value if isinstance(value, int) and not isinstance(value, bool) else number(value)

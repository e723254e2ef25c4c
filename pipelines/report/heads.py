"""What a report says of trained heads: their scores, what their assigners chose, how they were trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featstore.pictures import Details, Score, ScoreTable, Section, Table
from featstore.pipelines.report.documents import mapping, metric_name, number, objects, pretty, words


def head_sections(folders: Sequence[Path]) -> tuple[list[Section], str]:
    """Sections on the heads in ``folders``, and the sentence that leads to them.

    Raises:
        NotFoundError: if a folder holds no head.
        CorruptError: if its file is damaged.
    """
    from featstore.heads.files import read_head_json

    documents = {folder: read_head_json(folder) for folder in folders}
    groups: dict[str, list[Path]] = {}
    for folder, document in documents.items():
        extra = mapping(document["extra"])
        groups.setdefault(f"{words(extra.get('dataset_in_store'))}: {words(extra.get('task'))}", []).append(folder)
    sections: list[Section] = []
    for group, members in groups.items():
        sections += _scores(group, {folder: documents[folder] for folder in members})
    for folder, document in documents.items():
        if (weights := _assigners(folder, document)) is not None:
            sections.append(weights)
    described = tuple((_name(folder, document), pretty(_described(document))) for folder, document in documents.items())
    sections.append(Details(title="How the heads were trained", entries=described))
    return sections, f"{len(documents)} trained {'head' if len(documents) == 1 else 'heads'}."


def _name(folder: Path, document: Mapping[str, Any]) -> str:
    techniques = mapping(document["extra"]).get("techniques")
    timesteps = mapping(document["extra"]).get("timesteps")
    at = ", ".join(map(str, timesteps)) if isinstance(timesteps, list) else ""
    return f"{folder.resolve().name}: {words(techniques)}" + (f" at t = {at}" if at else "")


def _scores(group: str, documents: Mapping[Path, Mapping[str, Any]]) -> list[Section]:
    """A table of bars a metric that all of the group's heads are measured by."""
    measured = {
        _name(folder, document): mapping(mapping(document["metrics"]).get("splits"))
        for folder, document in documents.items()
    }
    metrics = dict.fromkeys(name for metrics in measured.values() for name in metrics)
    tables: list[Section] = []
    for metric in metrics:
        values = {head: mapping(found.get(metric)) for head, found in measured.items()}
        means = {head: mean for head, value in values.items() if (mean := number(value.get("mean"))) is not None}
        best = max(means.values(), default=0.0)
        tables.append(
            ScoreTable(
                title=f"{group}, {metric_name(metric)}",
                metric=metric_name(metric),
                scores=tuple(
                    Score(
                        name=head,
                        mean=mean,
                        std=number(values[head].get("std")) if _count(values[head].get("splits")) != 1 else None,
                        highlight=len(means) > 1 and mean == best,
                        note=_splits(values[head].get("splits")),
                    )
                    for head, mean in means.items()
                ),
            )
        )
    return tables


def _count(splits: object) -> int | None:
    return len(splits) if isinstance(splits, list) else None


def _splits(splits: object) -> str:
    count = _count(splits)
    return "" if count is None else "1 split" if count == 1 else f"{count} splits"


def _assigners(folder: Path, document: Mapping[str, Any]) -> Section | None:
    """Mean weight of each run, by what the assigners weigh; None for a head on one run."""
    chosen = mapping(mapping(mapping(document["metrics"]).get("first_split")).get("assigner_weights"))
    runs = [words(run.get("name")) for run in objects(mapping(document["features"]).get("runs"))]
    rows: list[tuple[str | float | None, ...]] = []
    for layer, assigners in chosen.items():
        for place, weights in enumerate(assigners if isinstance(assigners, list) else [], 1):
            if isinstance(weights, list) and len(weights) == len(runs):
                several = len(assigners) > 1
                rows.append((f"{layer}, {place}" if several else layer, *(number(weight) for weight in weights)))
    if len(runs) < 2 or not rows:
        return None
    return Table(
        title=f"What the assigners of {folder.resolve().name} chose",
        columns=("assigner", *runs),
        rows=tuple(rows),
        note="Mean weight of each run in the weighted sums that the head sees, on the first split.",
    )


def _described(document: Mapping[str, Any]) -> dict[str, Any]:
    metrics = mapping(document["metrics"])
    return {
        "kind": document["kind"],
        "config": document["config"],
        "features": document["features"],
        "metrics": metrics.get("splits"),
        "trained on": {name: document["extra"].get(name) for name in ("dataset", "techniques", "timesteps", "seed")},
        "versions": document.get("versions"),
    }

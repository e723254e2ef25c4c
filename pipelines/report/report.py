"""The report put together: what was asked for is read and checked first, pictures come last."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import featstore.store
from featstore.errors import BadRequestError
from featstore.pictures import Report, Section, write_report
from featstore.pipelines.report.experiment import experiment_sections, read_experiment
from featstore.pipelines.report.gate import gate_sections, read_gate
from featstore.pipelines.report.heads import head_sections
from featstore.pipelines.report.stores import Sampling, store_sections

_VERSIONS = ("featstore", "torch", "diffusers", "zarr")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """What the report is about."""

    store: str | None = None
    """URL of a store; None: the report is not about one."""
    heads: tuple[Path, ...] = ()
    """Folders of trained heads."""
    gate: Path | None = None
    """File that a gate wrote, or the folder that it is in."""
    experiment: Path | None = None
    """Folder of an experiment's results."""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """What pictures are made of."""
    title: str | None = None
    """Title of the page; None: after the store, or else the first thing that it is about."""
    out: Path = Path("report.html")
    """The file to write."""

    def __post_init__(self) -> None:
        """Refuse a report about nothing, and a name that no browser opens."""
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise BadRequestError(f"report {str(self.out)!r} does not end in .html", hint=f"name it {self.out}.html")
        if self.store is None and not self.heads and self.gate is None and self.experiment is None:
            raise BadRequestError("a report about nothing", hint="name a --store, --head, --gate or --experiment")
        if not 0 <= self.sampling.images <= 64:
            raise BadRequestError(f"{self.sampling.images} images to be shown; 0..64 are allowed")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReportResult:
    """What was written."""

    path: Path
    sections: tuple[str, ...]
    """Titles of the sections, in order."""
    size_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON."""
        return {"report": str(self.path), "sections": list(self.sections), "bytes": self.size_bytes}


def make_report(config: ReportConfig) -> ReportResult:
    """Write the page.

    Raises:
        NotFoundError: if something that it is about is not there.
        BadRequestError: if something is not what it was said to be.
        CorruptError: if the store or a head is damaged.
    """
    gate = None if config.gate is None else read_gate(config.gate)
    results = None if config.experiment is None else read_experiment(config.experiment)
    store = None if config.store is None else featstore.store.open(config.store)
    sections: list[Section] = []
    leads: list[str] = []
    names: list[str] = []

    def take(name: str, found: tuple[list[Section], str]) -> None:
        sections.extend(found[0])
        leads.append(found[1])
        names.append(name)

    heads = head_sections(config.heads) if config.heads else None
    if gate is not None:
        take("a gate", gate_sections(gate))
    if results is not None and config.experiment is not None:
        take("an experiment", experiment_sections(config.experiment, results))
    if heads is not None:
        take("trained heads", heads)
    if store is not None:
        take(str(store.url), store_sections(store, config.sampling))
    page = Report(
        title=config.title or f"featstore report: {names[-1]}",
        lead=" ".join(leads),
        sections=tuple(sections),
        made={
            "about": "\n".join(_sources(config)),
            "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS),
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        },
    )
    path = write_report(config.out, page)
    titles = tuple(section.title for section in sections)
    return ReportResult(path=path, sections=titles, size_bytes=path.stat().st_size)


def _sources(config: ReportConfig) -> list[str]:
    sources = [("store", config.store), ("gate", config.gate), ("experiment", config.experiment)]
    sources += [("head", folder) for folder in config.heads]
    return [f"{what} {where}" for what, where in sources if where is not None]

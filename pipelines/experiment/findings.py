"""All findings on the embedded world, and the document that reports them, by one command.

Run as ``python -m featstore.pipelines.experiment.findings --store findings.zarr --workers 2``. Every feature is
extracted once for all experiments, and a setting that stands in two of them is trained once. Text in the document is
written by hand; what stands between ``<!-- made: NAME -->`` and ``<!-- end: NAME -->`` is replaced by what came out.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featstore.errors import BadRequestError, FeatstoreError
from featstore.pictures.files import publish
from featstore.pipelines.experiment import file
from featstore.pipelines.experiment.config import TRAINED, ExperimentConfig, ExperimentPlan
from featstore.pipelines.experiment.planning import make_experiment_plan
from featstore.pipelines.experiment.results import MARKDOWN, PICTURE, saved_line, write_results
from featstore.pipelines.experiment.running import ExperimentResult, run_experiment
from featstore.pipelines.progress import Progress, Silent

logger = logging.getLogger("featstore.findings")

FINDINGS = ("techniques", "amalgamation", "steering", "assigners", "prompts", "gate")
"""The experiments, in the order of the document."""
WHOLE = "all"
"""Name of the part that is about all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FindingsConfig:
    """What is run, and where it goes."""

    store: str
    """URL of the store; what it lacks is extracted."""
    out: Path = Path("docs/findings")
    """Folder of the results, one folder an experiment."""
    document: Path | None = Path("docs/findings.md")
    """Document whose generated parts are replaced; None: none."""
    experiments: tuple[str, ...] = FINDINGS
    """Names or files."""
    workers: int = 1
    """Processes that train settings side by side."""
    splits: int | None = None
    """Splits of every head; None: as the experiments say. So with the next three, for quick looks."""
    ensemble: int | None = None
    max_steps: int | None = None
    limit: int | None = None
    device: str | None = None
    seed: int = 0


def findings(config: FindingsConfig, progress: Progress | None = None) -> list[ExperimentResult]:
    """Run all experiments and write what they gave.

    Raises:
        BadRequestError: for a document that lacks a part, before anything starts, and for what is wrong in a file.
        NotFoundError: if data or weights are absent, before anything starts.
    """
    asked = [_experiment(config, name) for name in config.experiments]
    text = None if config.document is None else _document(config.document, asked)
    plans = [make_experiment_plan(one) for one in asked]
    line = _saved(plans)
    logger.info("%s", line)
    results = []
    for one in asked:
        logger.info("%s", one.experiment.title)
        # Planned anew: what the one before has extracted and trained is there now.
        result = run_experiment(one, make_experiment_plan(one), progress or Silent())
        write_results(result, one.out)
        results.append(result)
    if text is not None and config.document is not None:
        for result in results:
            folder = result.plan.config.out
            link = os.path.relpath(folder / PICTURE, config.document.parent).replace(os.sep, "/")
            title = result.plan.config.experiment.title
            made = (folder / MARKDOWN).read_text("utf-8")
            text = _put(text, result.plan.config.experiment.name, f"{made}\n![{title}]({link})\n")
        publish(config.document, _put(text, WHOLE, f"{line}.\n").encode())
    return results


def _experiment(config: FindingsConfig, name: str) -> ExperimentConfig:
    loaded = file.load(name)
    return ExperimentConfig(
        experiment=loaded,
        store=config.store,
        out=config.out / loaded.name,
        trained=config.out / TRAINED,
        splits=config.splits,
        ensemble=config.ensemble,
        max_steps=config.max_steps,
        limit=config.limit,
        workers=config.workers,
        device=config.device,
        seed=config.seed,
    )


def _saved(plans: Sequence[ExperimentPlan]) -> str:
    """What extracting once saves over all experiments, and how many heads that makes."""
    made: dict[str, int] = {}
    for plan in plans:
        made.update(plan.runs)
    settings = [one for plan in plans for one in plan.settings]
    distinct = {one.key: one.training.splits for one in settings}
    saved = saved_line(sum(plan.passes_asked for plan in plans), sum(made.values()))
    heads = f"{len(settings)} settings, {len(distinct)} of them different: {sum(distinct.values()):,} heads"
    return f"{saved}; {heads}"


def _document(path: Path, asked: Sequence[ExperimentConfig]) -> str:
    """The document, which has a place for everything.

    Raises:
        BadRequestError: if it cannot be read or lacks a place.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequestError(
            f"cannot read {path}: {error}", hint="--document names another; '' writes none"
        ) from error
    for name in (*(one.experiment.name for one in asked), WHOLE):
        if not _place(name).search(text):
            raise BadRequestError(
                f"{path} has no place for {name!r}",
                hint=f"add the lines <!-- made: {name} --> and <!-- end: {name} -->",
            )
    return text


def _place(name: str) -> re.Pattern[str]:
    escaped = re.escape(name)
    return re.compile(rf"(<!-- made: {escaped} -->\n).*?(<!-- end: {escaped} -->)", re.DOTALL)


def _put(text: str, name: str, made: str) -> str:
    return _place(name).sub(lambda match: f"{match[1]}\n{made}\n{match[2]}", text)


class _Log:
    """Tells stages to the log, a line each."""

    def start(self, title: str, total: int, unit: str) -> None:
        logger.info("%s: %d %s", title, total, unit)

    def advance(self, steps: int = 1) -> None:
        pass

    def describe(self, title: str) -> None:
        pass

    def note(self, text: str) -> None:
        logger.info("%s", text)

    def stop(self) -> None:
        pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", default="findings.zarr", help="store of the features")
    parser.add_argument("--out", type=Path, default=Path("docs/findings"), help="folder of the results")
    parser.add_argument("--document", default="docs/findings.md", help="its generated parts are replaced; '': none")
    parser.add_argument("--experiments", nargs="+", default=FINDINGS, metavar="NAME|FILE")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="training processes")
    for name in ("splits", "ensemble", "max-steps", "limit"):
        parser.add_argument(f"--{name}", type=int, default=None, help="as in featstore experiment, for quick looks")
    parser.add_argument("--device", default=None)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("featstore.heads").setLevel(logging.ERROR)
    config = FindingsConfig(
        store=given.store,
        out=given.out,
        document=Path(given.document) if given.document else None,
        experiments=tuple(given.experiments),
        workers=given.workers,
        splits=given.splits,
        ensemble=given.ensemble,
        max_steps=given.max_steps,
        limit=given.limit,
        device=given.device,
        seed=given.seed,
    )
    try:
        findings(config, _Log())
    except FeatstoreError as error:
        hint = f"\nhint: {error.hint}" if error.hint else ""
        raise SystemExit(f"error: {error}{hint}") from None


if __name__ == "__main__":
    main()

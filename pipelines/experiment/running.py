"""An experiment from end to end: extracted once, every setting trained once, settings compared on the same splits."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from featstore.errors import NotCommittedError
from featstore.pictures.files import publish
from featstore.pipelines.experiment.config import ExperimentConfig, ExperimentPlan, PlannedSetting, ScoredRuns, Scores
from featstore.pipelines.experiment.content import content_score
from featstore.pipelines.experiment.planning import make_experiment_plan
from featstore.pipelines.experiment.statistics import Difference, RankCorrelation, paired, rank_correlation
from featstore.pipelines.extract import execute
from featstore.pipelines.memory import peak_rss_bytes
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.tasks import TASKS
from featstore.pipelines.train_head import train_head


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one setting scored."""

    planned: PlannedSetting
    scores: Scores
    reused: bool
    """Whether it had been trained before, on the same features in the same way."""

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain JSON."""
        training = self.planned.training
        return {
            "name": self.planned.setting.name,
            "axes": dict(self.planned.setting.axes),
            "dataset": training.bucket.dataset,
            "techniques": training.bucket.techniques,
            "timesteps": list(training.bucket.timesteps),
            "layers": training.bucket.layers,
            "task": training.task,
            "assigners": training.assigners,
            "ensemble": training.ensemble,
            "max_steps": training.max_steps,
            "seed": training.seed,
            "runs": list(self.planned.runs),
            "metrics": {name: dataclasses.asdict(metric) for name, metric in self.scores.metrics.items()},
            "seconds": self.scores.seconds,
            "reused": self.reused,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Two settings on the same splits."""

    a: str
    b: str
    metric: str
    found: Difference

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON."""
        return {"a": self.a, "b": self.b, "metric": self.metric, **dataclasses.asdict(self.found)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSetting:
    """The content-shift score of a setting's features, and what it gains in the metric."""

    setting: str
    over: str
    score: float
    """1: like ``over``'s technique at the reference timestep; 0: as far from that as the anchor."""
    own_score: float
    """The same, with the setting's own technique at the reference timestep to begin from. A technique that adds to
    activations changes features where no content can shift, which counts in ``score`` and not here."""
    score_gain: float
    """The score above that of ``over``."""
    pattern_score: float
    """The score of patterns, in which it does not count how large activations are."""
    pattern_gain: float
    """The same above that of ``over``."""
    value: float
    """Mean of the metric."""
    gain: float
    """The metric above that of ``over``."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Correlated:
    """How well the score foretells what a technique gains."""

    metric: str
    rows: tuple[ScoredSetting, ...]
    found: Mapping[str, RankCorrelation]
    """By what is correlated with what."""

    def to_json(self) -> dict[str, Any]:
        """The correlations as plain JSON."""
        return {
            "metric": self.metric,
            "settings": [dataclasses.asdict(row) for row in self.rows],
            "correlations": [{"of": name, **dataclasses.asdict(one)} for name, one in self.found.items()],
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentResult:
    """Everything that an experiment gave; `to_json` is what ``--json`` prints and ``results.json`` holds."""

    plan: ExperimentPlan
    outcomes: tuple[Outcome, ...]
    compared: tuple[Compared, ...]
    correlated: Correlated | None
    passes_now: int
    """Forward passes that were run by this call."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON."""
        experiment = self.plan.config.experiment
        return {
            "experiment": experiment.name,
            "title": experiment.title,
            "question": experiment.question,
            "axes": list(experiment.axes),
            "settings": [outcome.to_json() for outcome in self.outcomes],
            "comparisons": [one.to_json() for one in self.compared],
            **({} if self.correlated is None else {"correlation": self.correlated.to_json()}),
            "passes_asked": self.plan.passes_asked,
            "passes_made": self.plan.passes_made,
            "passes_now": self.passes_now,
            "seconds": self.seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }


def run_experiment(
    config: ExperimentConfig, plan: ExperimentPlan | None = None, progress: Progress | None = None
) -> ExperimentResult:
    """Run an experiment. What has been extracted or trained before, in the same way, is not done again.

    Args:
        config: which one.
        plan: of `make_experiment_plan`, where it has been made already.
        progress: told of every stage.

    Raises:
        NotCommittedError: if features of an image cannot be made: settings would then have different splits.
    """
    start = time.perf_counter()
    progress = progress or Silent()
    plan = make_experiment_plan(config) if plan is None else plan
    passes = 0
    for extraction in plan.extractions:
        if extraction.passes_todo:
            report = execute(extraction, progress)
            passes += report.passes
            for key, reason in report.failed.items():
                raise NotCommittedError(
                    f"{len(report.failed)} images cannot be extracted, so that settings would be compared on different "
                    f"images; {key!r}: {reason}",
                    hint="leave such images out of the data set",
                )
    outcomes = _train_all(plan, progress)
    compared = _compare(plan, outcomes)
    return ExperimentResult(
        plan=plan,
        outcomes=tuple(outcomes),
        compared=compared,
        correlated=_correlate(plan, outcomes, progress),
        passes_now=passes,
        seconds=time.perf_counter() - start,
    )


def _train_all(plan: ExperimentPlan, progress: Progress) -> list[Outcome]:
    """Outcomes of all settings, in their order. What two settings have in common in all but name is trained once."""
    todo = list({one.key: one for one in plan.settings if one.known is None}.values())
    workers = min(plan.config.workers, len(todo))
    made: dict[str, Scores] = {}
    if workers > 1:
        progress.start(f"training, {workers} settings at a time", len(todo), "settings")
        try:
            for one, scores in _in_processes(todo, workers):
                made[one.key] = scores
                progress.advance()
        finally:
            progress.stop()
    else:
        for number, one in enumerate(todo, 1):
            progress.note(f"setting {number} of {len(todo)}: {one.setting.name}")
            made[one.key] = _train(one, progress)
    return [
        Outcome(planned=one, scores=one.known or made[one.key], reused=one.known is not None) for one in plan.settings
    ]


def _in_processes(todo: Sequence[PlannedSetting], workers: int) -> Iterator[tuple[PlannedSetting, Scores]]:
    """Settings as they are done, with their scores; those that wait are dropped when one fails."""
    # spawned: a fork would share the threads' locks of torch and of the store
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(threads,))
    try:
        waiting = {pool.submit(_train, one, Silent()): one for one in todo}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _train(planned: PlannedSetting, progress: Progress) -> Scores:
    """Train and score one setting on every split, and keep its scores."""
    report = train_head(planned.training, progress)
    scores = Scores(metrics=report.metrics, seconds=report.seconds)
    kept = {name: dataclasses.asdict(metric) for name, metric in scores.metrics.items()}
    document = {"key": planned.key, "setting": planned.setting.name, "metrics": kept, "seconds": scores.seconds}
    publish(planned.file, json.dumps(document, indent=1).encode() + b"\n")
    return scores


def _compare(plan: ExperimentPlan, outcomes: list[Outcome]) -> tuple[Compared, ...]:
    scored = {one.planned.setting.name: one for one in outcomes}
    found = []
    for a, b, metric in plan.config.experiment.pairs():
        if a.name in scored and b.name in scored:
            name = metric or TASKS[a.head.task].metrics[0]
            values = [scored[one.name].scores.metrics[name].splits for one in (a, b)]
            if len(values[0]) == len(values[1]):
                found.append(Compared(a=a.name, b=b.name, metric=name, found=paired(*values)))
    return tuple(found)


def _correlate(plan: ExperimentPlan, outcomes: list[Outcome], progress: Progress) -> Correlated | None:
    """Scores of the features, gains of the heads, and how they go together."""
    asked = plan.config.experiment.correlate
    if asked is None or not plan.scored:
        return None
    scored = {one.planned.setting.name: one for one in outcomes}
    metric = asked.metric or TASKS[scored[plan.scored[0].setting].planned.training.task].metrics[0]
    plain: dict[str, tuple[float, float]] = {}
    rows = []
    progress.start("content-shift scores", len(plan.scored), "settings")
    try:
        for one in plan.scored:
            if one.over not in plain:
                over = dataclasses.replace(one, run=scored[one.over].planned.training.bucket)
                plain[one.over] = _scores(over)
            score, pattern = _scores(one)
            own_score = content_score(one.run, one.reference, one.anchor, origin=one.origin)
            value, base = (scored[name].scores.metrics[metric].mean for name in (one.setting, one.over))
            rows.append(
                ScoredSetting(
                    setting=one.setting,
                    over=one.over,
                    score=score,
                    own_score=own_score,
                    score_gain=score - plain[one.over][0],
                    pattern_score=pattern,
                    pattern_gain=pattern - plain[one.over][1],
                    value=value,
                    gain=value - base,
                )
            )
            progress.advance()
    finally:
        progress.stop()
    figures: dict[str, Callable[[ScoredSetting], float]] = {
        "score": lambda row: row.score,
        "gain in score": lambda row: row.score_gain,
        "own score": lambda row: row.own_score,
        "score of patterns": lambda row: row.pattern_score,
        "gain in score of patterns": lambda row: row.pattern_gain,
    }
    gains = [row.gain for row in rows]
    found = {
        f"{name} and gain in {metric}": rank_correlation([of(row) for row in rows], gains)
        for name, of in figures.items()
    }
    found[f"score and {metric}"] = rank_correlation([row.score for row in rows], [row.value for row in rows])
    return Correlated(metric=metric, rows=tuple(rows), found=found)


def _scores(one: ScoredRuns) -> tuple[float, float]:
    """The paper's score of a setting's features, and that of patterns."""
    whole, pattern = (content_score(one.run, one.reference, one.anchor, pattern=kind) for kind in (False, True))
    return whole, pattern

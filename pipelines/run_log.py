"""What an extraction says in the log that is kept in the store: what was asked for, how far it is, what came of it."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from featstore.pipelines.memory import peak_rss_bytes, rss_bytes
from featstore.pipelines.outcome import RunOutcome
from featstore.pipelines.plan import ExtractConfig, Plan
from featstore.pipelines.progress import Progress
from featstore.store.objects import Objects
from featstore.store.run_log import PART_SECONDS, RunLog

if TYPE_CHECKING:
    from featstore.pipelines.engine import Engine

_MAX_RUNS = 200
_SECRET = re.compile(r"(?<=://)[^/@\s]+@|\?[^\s'\"]*")
"""User and password, and the query, of a URL: both may let somebody in."""


def without_secrets(text: str) -> str:
    """``text`` without what in URLs may be a password."""
    return _SECRET.sub(lambda match: "..@" if match[0].endswith("@") else "?..", text)


def command_of(config: ExtractConfig) -> str:
    """The command that asks for what ``config`` does, as far as options can say it; defaults and secrets left out."""
    size = config.image_size_px
    options: dict[str, object] = {
        "--dataset": config.dataset,
        "--techniques": config.techniques,
        "--model": config.model,
        "--timesteps": ",".join(map(str, config.timesteps)) if config.timesteps != (50,) else None,
        "--layers": config.layers,
        "--image-size": "x".join(map(str, size)) if isinstance(size, tuple) else size,
        "--split": config.split,
        "--limit": config.limit,
        "--prompt": config.steering.prompt,
        "--denoise-from": config.denoise_from,
        "--noise-ensemble": config.noise_ensemble if config.noise_ensemble > 1 else None,
        "--precision": config.precision if config.precision != "float16" else None,
        "--reduce": config.reduce,
        "--batch-size": config.batch_size,
        "--device": config.device,
        "--dataset-name": config.dataset_name,
        "--seed": config.seed or None,
        "--store": config.store,
    }
    words = [str(word) for option, value in options.items() if value is not None for word in (option, value)]
    flags = [f"--{name}" for name in ("compress", "overwrite") if getattr(config, name)]
    return without_secrets(shlex.join(["featstore", "extract", *words, *flags]))


class ExtractionLog:
    """The log of one extraction; a context manager, to be entered before anything is computed.

    Args:
        plan: what is to be done.
        objects: of the store.
        progress: told once if the log cannot be written; what it is told by others is logged.
        part_seconds: time between two looks at how far things are.
    """

    def __init__(self, plan: Plan, objects: Objects, progress: Progress, *, part_seconds: float = PART_SECONDS) -> None:
        self._plan = plan
        self._outcomes: Sequence[RunOutcome] = ()
        self._engine: Engine | None = None
        self._logged: list[int] = []
        """How many failed images of each run are logged."""
        self._begin = time.monotonic()
        self.log = RunLog(objects, _facts(plan), note=progress.note, beat=self._beat, part_seconds=part_seconds)
        self.progress: Progress = _Noted(progress, self.log)
        """``progress``, whose notes are logged too."""

    def __enter__(self) -> Self:
        self.log.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._conclude()
        self.log.__exit__(kind, value, trace)

    def watch(self, outcomes: Sequence[RunOutcome], engine: Engine) -> None:
        """Say from now on how far these runs are, and who has done how much."""
        self._logged = [0] * len(outcomes)
        self._outcomes, self._engine = outcomes, engine

    def _beat(self) -> None:
        failed = 0
        for place, outcome in enumerate(self._outcomes):
            reasons = list(outcome.failed.items())
            for key, reason in reasons[self._logged[place] :]:
                self.log.event("failed", run=outcome.run.path, key=key, reason=reason)
            self._logged[place] = len(reasons)
            failed += len(reasons)
        computed = sum(outcome.computed for outcome in self._outcomes)
        engine, device = self._engine, {}
        if engine is not None:
            for worker in list(engine.workers):
                self.log.event("worker", **_worker(worker.to_json()))
            if engine.peak_device_bytes is not None:
                device = {"peak_device_bytes": engine.peak_device_bytes}
        rss = {"rss_bytes": rss_bytes(), "peak_rss_bytes": peak_rss_bytes()}
        self.log.event("progress", computed=computed, failed=failed, **rss, **device)

    def _conclude(self) -> None:
        plan, engine, outcomes = self._plan, self._engine, self._outcomes
        computed = sum(outcome.computed for outcome in outcomes)
        seconds = time.monotonic() - self._begin
        device = None if engine is None else engine.peak_device_bytes
        workers = [] if engine is None else [_worker(worker.to_json()) for worker in engine.workers]
        self.log.conclude(
            computed=computed,
            cached=len(plan.wanted) * len(plan.runs) - plan.passes_todo,
            passes_per_second=computed / seconds if seconds > 0 else 0.0,
            peak_rss_bytes=peak_rss_bytes(),
            **({} if device is None else {"peak_device_bytes": device}),
            workers=workers,
            retries=0 if engine is None else engine.retries,
        )


def _worker(facts: dict[str, Any]) -> dict[str, Any]:
    return {("worker" if name == "name" else name): value for name, value in facts.items()}


def _facts(plan: Plan) -> dict[str, Any]:
    runs = plan.runs[:_MAX_RUNS]
    return {
        "command": command_of(plan.config),
        "dataset": plan.dataset_name,
        "model": plan.source.name,
        "device": plan.device,
        "plan": {
            "images": len(plan.wanted),
            "passes": plan.passes_todo,
            "bytes": plan.bytes_todo,
            "runs": len(plan.runs),
            "of_runs": [
                {
                    "technique": run.recipe.technique,
                    "timestep": run.recipe.timestep,
                    "fingerprint": run.recipe.fingerprint,
                    "compute": int(run.todo.sum()),
                }
                for run in runs
            ],
        },
    }


class _Noted:
    """A `Progress` whose notes are logged as well."""

    def __init__(self, progress: Progress, log: RunLog) -> None:
        self._progress = progress
        self._log = log

    def start(self, title: str, total: int, unit: str) -> None:
        self._log.event("stage", title=title, total=total, unit=unit)
        self._progress.start(title, total, unit)

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(steps)

    def describe(self, title: str) -> None:
        self._progress.describe(title)

    def note(self, text: str) -> None:
        self._log.event("note", text=without_secrets(text))
        self._progress.note(text)

    def stop(self) -> None:
        self._progress.stop()

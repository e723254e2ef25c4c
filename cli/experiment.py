"""`featstore experiment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featstore.cli import console
from featstore.cli.extract import print_plan
from featstore.cli.options import (
    DEFAULT_STORE,
    DataRootOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    QuickEnsembleOption,
    QuickLimitOption,
    QuickMaxStepsOption,
    QuickSplitsOption,
    SeedOption,
    StoreOption,
)
from featstore.pipelines.experiment import file
from featstore.pipelines.experiment.config import ExperimentConfig, ExperimentPlan
from featstore.pipelines.experiment.planning import make_experiment_plan
from featstore.pipelines.experiment.results import first_metric, saved_line, write_results
from featstore.pipelines.experiment.running import ExperimentResult, run_experiment


@console.handled
def experiment(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            help=f"An experiment, one of {', '.join(file.names())}, or a TOML file.",
            show_default=False,
        ),
    ],
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Only this setting; may be given again.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan only.")] = False,
    splits: QuickSplitsOption = None,
    ensemble: QuickEnsembleOption = None,
    max_steps: QuickMaxStepsOption = None,
    limit: QuickLimitOption = None,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", min=1, help="Processes that train settings side by side.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of the results; default experiments/NAME.", show_default=False
        ),
    ] = None,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    data_root: DataRootOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run an ablation: train a head for every setting of a file, on features that are extracted once for all of them.

    Passes, bytes and time are said before anything starts. Settings are compared on the same splits. What is extracted
    or trained already is not done again, so after an interruption the same command goes on.

    **Example**: `featstore experiment techniques --dry-run`
    """
    asked = file.load(name)
    config = ExperimentConfig(
        experiment=asked,
        store=store,
        out=out or Path("experiments") / asked.name,
        only=tuple(only or ()),
        splits=splits,
        ensemble=ensemble,
        max_steps=max_steps,
        limit=limit,
        workers=workers,
        device=device,
        data_root=data_root,
        seed=seed,
    )
    plan = make_experiment_plan(config)
    if dry_run and as_json:
        console.print_json(plan.to_json())
        return
    print_experiment(plan, to_out=dry_run)
    if dry_run:
        return
    result = run_experiment(config, plan, console.Bar())
    written = write_results(result, config.out)
    if as_json:
        console.print_json(result.to_json())
        return
    _print(result)
    console.say(f"results: {', '.join(map(str, written))}", to=console.out)


def print_experiment(plan: ExperimentPlan, *, to_out: bool) -> None:
    """Say what will be extracted and trained, what that saves, and about how long it takes."""
    to = console.out if to_out else console.err
    for extraction in plan.extractions:
        print_plan(extraction, to=to)
    console.say((saved_line(plan.passes_asked, plan.passes_made), "bold"), to=to)
    if plan.passes_todo:
        size, time = console.human_bytes(plan.bytes_todo), _time(plan.seconds)
        console.say(f"  {plan.passes_todo:,} of them are still to be made, {size}, {time}", to=to)
    else:
        console.say("  the store has them all", to=to)
    known = sum(one.known is not None for one in plan.settings)
    console.say(f"{len(plan.settings)} settings, {known} of them trained already", to=to)
    if plan.trainings_todo:
        console.say(f"  {plan.trainings_todo} heads are still to be trained, {_time(plan.training_seconds)}", to=to)


def _time(seconds: float | None) -> str:
    return "time not known yet on this machine" if seconds is None else f"about {console.human_seconds(seconds)}"


def _print(result: ExperimentResult) -> None:
    rows: list[tuple[object, ...]] = []
    for outcome in result.outcomes:
        name = first_metric(outcome)
        metric = outcome.scores.metrics[name]
        setting = outcome.planned.setting.name
        rows.append((setting, name, f"{100 * metric.mean:.2f}", f"{100 * metric.std:.2f}", len(metric.splits)))
    title = result.plan.config.experiment.title
    console.print_table(title, ("setting", "metric", "mean %", "deviation", "splits"), rows)
    if result.compared:
        rows = []
        for one in result.compared:
            found = one.found
            interval = "-" if found.ci95 is None else " .. ".join(f"{100 * edge:+.2f}" for edge in found.ci95)
            p = "-" if found.p is None else f"{found.p:.3f}"
            rows.append((one.a, one.b, one.metric, f"{100 * found.difference:+.2f}", interval, p))
        console.print_table(
            "Differences on the same splits", ("setting", "over", "metric", "points", "95 % interval", "p"), rows
        )
    if result.correlated is not None:
        rows = [
            (name, "-" if one.rho is None else f"{one.rho:+.2f}", "-" if one.p is None else f"{one.p:.3f}")
            for name, one in result.correlated.found.items()
        ]
        console.print_table(f"Ranks of {len(result.correlated.rows)} settings", ("of", "rho", "p"), rows)

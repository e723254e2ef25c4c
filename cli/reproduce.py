"""`featstore reproduce`."""

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
from featstore.pipelines import recipe_file
from featstore.pipelines.reproduce import ReproduceConfig, Reproduction, make_plans
from featstore.pipelines.reproduce import reproduce as run_all


@console.handled
def reproduce(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            help=f"An experiment, one of {', '.join(recipe_file.names())}, or a TOML file.",
            show_default=False,
        ),
    ],
    head: Annotated[
        list[str] | None, typer.Option("--head", metavar="NAME", help="Only this head; may be given again.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan only.")] = False,
    splits: QuickSplitsOption = None,
    ensemble: QuickEnsembleOption = None,
    max_steps: QuickMaxStepsOption = None,
    limit: QuickLimitOption = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of heads and results.")] = Path(
        "reproduced"
    ),
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    data_root: DataRootOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a whole experiment of the paper: extract what it needs, train its heads, print scores beside the reported.

    Data, weights and disk space are checked before anything starts. What is extracted or trained already is not
    done again, so after an interruption the same command goes on.

    **Example**: `featstore reproduce horse21 --dry-run`
    """
    config = ReproduceConfig(
        recipe=recipe_file.load(name),
        store=store,
        out=out,
        heads=tuple(head or ()),
        splits=splits,
        ensemble=ensemble,
        max_steps=max_steps,
        limit=limit,
        device=device,
        data_root=data_root,
        seed=seed,
    )
    plans = make_plans(config)
    if dry_run and as_json:
        console.print_json(
            {"experiment": config.recipe.name, "extract": {name: plan.to_json() for name, plan in plans.items()}}
        )
        return
    for stage, plan in plans.items():
        console.say((stage, "bold"), to=console.out if dry_run else console.err)
        print_plan(plan, to=console.out if dry_run else console.err)
    if dry_run:
        return
    result = run_all(config, plans, console.Bar())
    if as_json:
        console.print_json(result.to_json())
    else:
        _print(result)
    if result.failed:
        raise typer.Exit(console.FAILED)


def _print(result: Reproduction) -> None:
    rows = []
    for outcome in result.outcomes:
        for number, (name, metric) in enumerate(outcome.metrics.items()):
            reported = outcome.training.reported.get(name)
            rows.append(
                (
                    "" if number else outcome.name,
                    name,
                    f"{100 * metric.mean:.2f}",
                    f"{100 * metric.std:.2f}",
                    len(metric.splits),
                    "-" if reported is None else f"{100 * reported:.2f}",
                )
            )
    columns = ("head", "metric", "mean %", "deviation", "splits", "reported %")
    console.print_table(result.recipe.title, columns, rows)
    for outcome in result.outcomes:
        if outcome.training.note:
            console.say(f"{outcome.name}: {outcome.training.note}")
    for key, reason in result.failed.items():
        console.say(("failed", "red"), f" {key}: {reason}")

"""`featstore push`, `featstore pull` and `featstore rm`: features on their way between stores, and out of one."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from featstore.cli import console, selection
from featstore.cli.options import DEFAULT_STORE, AnySeedOption, DebugOption, JsonOption, StoreOption
from featstore.cli.selection import (
    LayersFilter,
    ModelFilter,
    RunFilter,
    TechniquesFilter,
    TimestepsFilter,
    WhereFilter,
)
from featstore.errors import BadRequestError
from featstore.pipelines import removal
from featstore.pipelines.transfer import TransferConfig, TransferReport, execute, make_plan, plan_json
from featstore.store.transfer import TransferPlan

_SHOWN = 20

UrlArgument = Annotated[
    str, typer.Argument(metavar="URL", help="The other store: a path, s3://, gs://, az://, http://.")
]
DatasetFilter = Annotated[str | None, typer.Option("--dataset", metavar="D", help="Only this data set.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
UpdateOption = Annotated[
    bool,
    typer.Option(
        "--update-images",
        help="Where an image is not the same on both sides, take the one that is copied from: what the other side "
        "has of it becomes stale. Without this it is left out.",
    ),
]
DigestsOption = Annotated[
    bool,
    typer.Option(
        "--digests/--no-digests", help="Compare both sides at the end, which reads a few bytes of every image."
    ),
]


@console.handled
def push(
    url: UrlArgument,
    dataset: DatasetFilter = None,
    techniques: TechniquesFilter = None,
    model: ModelFilter = None,
    timesteps: TimestepsFilter = None,
    layers: LayersFilter = None,
    run: RunFilter = None,
    where: WhereFilter = None,
    update_images: UpdateOption = False,
    digests: DigestsOption = True,
    dry_run: DryRunOption = False,
    store: StoreOption = DEFAULT_STORE,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Copy to another store what it lacks of this one, every image checked on its way.

    What was cut off is gone on with by the same command. Blocks that are damaged are named and left out, and the
    exit status is then 1.

    **Example**: `featstore push s3://team/features --store features.zarr --dataset toyhorse`
    """
    _copy(
        TransferConfig(
            source=store,
            target=url,
            dataset=dataset,
            query=selection.query(techniques, model, timesteps, layers, run, where),
            update_images=update_images,
            digests=digests,
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


@console.handled
def pull(
    url: UrlArgument,
    dataset: DatasetFilter = None,
    techniques: TechniquesFilter = None,
    model: ModelFilter = None,
    timesteps: TimestepsFilter = None,
    layers: LayersFilter = None,
    run: RunFilter = None,
    where: WhereFilter = None,
    update_images: UpdateOption = False,
    digests: DigestsOption = True,
    dry_run: DryRunOption = False,
    store: StoreOption = DEFAULT_STORE,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Copy from another store what this one lacks, every image checked on its way; as `push`, the other way round.

    **Example**: `featstore pull http://host:8321 --store features.zarr --techniques prompt,controlnet`
    """
    _copy(
        TransferConfig(
            source=url,
            target=store,
            dataset=dataset,
            query=selection.query(techniques, model, timesteps, layers, run, where),
            update_images=update_images,
            digests=digests,
        ),
        dry_run=dry_run,
        as_json=as_json,
    )


def _copy(config: TransferConfig, *, dry_run: bool, as_json: bool) -> None:
    plan = make_plan(config)
    if dry_run and as_json:
        console.print_json(plan_json(config, plan))
        return
    _print_plan(config, plan, to=console.out if dry_run else console.err)
    if dry_run:
        return
    report = execute(config, plan, console.Bar())
    if as_json:
        console.print_json(report.to_json())
    _print_report(report, to=console.err if as_json else console.out)
    if report.problems:
        raise typer.Exit(console.FAILED)


def _print_plan(config: TransferConfig, plan: TransferPlan, *, to: Console) -> None:
    console.say((config.source, "bold"), " to ", (config.target, "bold"), to=to)
    for lack in plan.datasets:
        line = f"  {lack.source.name}: {len(lack.source.samples)} images"
        if lack.new_images:
            line += f", {lack.new_images} new there"
        if lack.differing:
            taken = "theirs are replaced" if config.update_images else "left out; --update-images takes these"
            line += f", {len(lack.differing)} not the same there ({taken})"
        console.say(line, to=to)
        for run in lack.runs:
            todo, there = run.blocks()
            recipe = run.run.recipe
            line = f"    {recipe.technique} t{recipe.timestep:03d} {run.run.fingerprint[:8]}: {there} blocks are there"
            if todo:
                line += f", {todo} to copy with {run.images} images, {console.human_bytes(run.bytes_todo)}"
            console.say(line, to=to)
    if not plan.datasets:
        console.say("  nothing to copy: there are no runs", to=to)
    console.say(f"  in all {console.human_bytes(plan.bytes_todo)} to copy", to=to)


def _print_report(report: TransferReport, *, to: Console) -> None:
    rate = f" ({console.human_bytes(report.bytes / report.seconds)}/s)" if report.bytes else ""
    console.say(
        f"{report.copied} blocks copied, {report.skipped} were there already, "
        f"{console.human_bytes(report.bytes)} in {console.human_seconds(report.seconds)}{rate}",
        to=to,
    )
    for problem in report.problems[:_SHOWN]:
        console.say(("not copied: ", "red"), problem, to=to)
    if len(report.problems) > _SHOWN:
        console.say(f"and {len(report.problems) - _SHOWN} more, all of them with --json", to=to)
    if report.digests is None:
        return
    ours, theirs = report.digests
    console.say(f"digest of {report.config.source}: {ours}", to=to)
    console.say(f"digest of {report.config.target}: {theirs}", to=to)
    if ours == theirs:
        console.say("both sides hold the same", to=to)
    elif not report.problems:
        console.say("some images were extracted on both sides, with other last bits; each side keeps its own", to=to)


@console.handled
def rm(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN..",
            help="A path as `featstore info --long` prints it, first digits of a fingerprint, or a technique.",
            show_default=False,
        ),
    ] = None,
    dataset: DatasetFilter = None,
    model: ModelFilter = None,
    timesteps: TimestepsFilter = None,
    where: WhereFilter = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove the whole data set of --dataset, with its runs and its sample table.")
    ] = False,
    dry_run: DryRunOption = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: StoreOption = DEFAULT_STORE,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove runs, or a whole data set, from a store. There is no way back.

    It says what would go and asks, unless --yes is given. A technique means every run of it that the options leave.
    A removal that was cut off is finished by the same command.

    **Examples**

    `featstore rm toyhorse/reference/prompt-1a2b3c4d/t050 --dry-run`

    `featstore rm controlnet --dataset toyhorse --timesteps 50 --yes`
    """
    config = removal.RemovalConfig(
        store=store,
        runs=tuple(runs or ()),
        dataset=dataset,
        query=selection.query(None, model, timesteps, None, None, where),
        everything=everything,
    )
    plan = removal.make_plan(config)
    report = {"store": store, "runs": [one.to_json() for one in plan.runs], "bytes": plan.bytes, "removed": False}
    if dry_run and as_json:
        console.print_json(report)
        return
    _print_removal(plan, to=console.out if dry_run else console.err)
    if dry_run:
        return
    _confirm(plan, yes=yes, ask=not as_json)
    removal.execute(config, plan, console.Bar())
    if as_json:
        console.print_json(report | {"removed": True})
    else:
        console.say(f"removed {plan.what}, {console.human_bytes(plan.bytes)}", to=console.out)


def _print_removal(plan: removal.RemovalPlan, *, to: Console) -> None:
    for one in plan.runs:
        console.say(f"  {one.path}: {one.images} images, {console.human_bytes(one.bytes)}", to=to)
    console.say(f"  in all {plan.what}, {console.human_bytes(plan.bytes)}", to=to)


def _confirm(plan: removal.RemovalPlan, *, yes: bool, ask: bool) -> None:
    """Go on only if that is what is wanted."""
    if yes:
        return
    if not ask or not (sys.stdin.isatty() and console.err.is_terminal):
        raise BadRequestError(
            f"this would remove {plan.what}, {console.human_bytes(plan.bytes)}: {plan.paths}",
            hint="add --yes to do it, or --dry-run to look first",
        )
    try:
        agreed = typer.confirm(f"Remove {plan.what} for good?", err=True)
    except typer.Abort:
        raise typer.Exit(console.INTERRUPTED) from None
    if not agreed:
        console.say("nothing was removed")
        raise typer.Exit(console.FAILED)

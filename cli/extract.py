"""`featstore extract`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from featstore.cli import console
from featstore.cli.options import (
    DEFAULT_STORE,
    AllowPickleOption,
    CaptionsOption,
    ControlnetScaleOption,
    DataRootOption,
    DatasetNameOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    GuidanceScaleOption,
    ImageSizeOption,
    IpAdapterScaleOption,
    JsonOption,
    LayersOption,
    LoraScaleOption,
    ModelOption,
    PromptOption,
    SchedulerOption,
    SeedOption,
    StoreOption,
    TechniquesOption,
    TimestepsOption,
    WorkersOption,
    parse_image_size,
    parse_timesteps,
)
from featstore.pipelines.cluster.config import ClusterConfig
from featstore.pipelines.cluster.opening import open_cluster
from featstore.pipelines.extract import ExtractReport, execute
from featstore.pipelines.plan import ExtractConfig, Plan, PlannedRun, make_plan
from featstore.techniques import SteeringOptions

_SHOWN_FAILURES = 20


@console.handled
def extract(
    dataset: DatasetOption,
    techniques: TechniquesOption,
    model: ModelOption = None,
    timesteps: TimestepsOption = "50",
    layers: LayersOption = None,
    image_size: ImageSizeOption = None,
    split: Annotated[str | None, typer.Option("--split", metavar="S", help="Only this split's images.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="Only the first N images.")] = None,
    prompt: PromptOption = None,
    captions: CaptionsOption = None,
    prompt_chunks: Annotated[
        int,
        typer.Option(
            "--prompt-chunks",
            metavar="N",
            help="Encode texts in N chunks of 75 tokens each; cross-attention maps have N times the channels.",
        ),
    ] = 1,
    controlnet_scale: ControlnetScaleOption = 1.0,
    lora_scale: LoraScaleOption = 1.0,
    ip_adapter_scale: IpAdapterScaleOption = 1.0,
    guidance_scale: GuidanceScaleOption = 7.5,
    denoise_from: Annotated[
        int | None,
        typer.Option("--denoise-from", metavar="T", help="Noise to this timestep, denoise from there to --timesteps."),
    ] = None,
    noise_ensemble: Annotated[
        int, typer.Option("--noise-ensemble", metavar="N", help="Average the features over N draws of the noise.")
    ] = 1,
    allow_pickle: AllowPickleOption = False,
    precision: Annotated[
        str,
        typer.Option(
            "--precision", metavar="TYPE", help="float16, float32, or int8 with a scale an image and channel, on disk."
        ),
    ] = "float16",
    reduce: Annotated[
        str | None,
        typer.Option(
            "--reduce",
            metavar="pca:N",
            help="Project layers of more than N channels onto N, fitted on the data set's first images.",
        ),
    ] = None,
    compress: Annotated[
        bool,
        typer.Option("--compress", help="Put the maps of new runs behind zstd: lossless, slower, seldom 15 % smaller."),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", help="Rows of every forward pass of new runs; default: what fits."),
    ] = None,
    device: DeviceOption = None,
    workers: WorkersOption = 0,
    scheduler: SchedulerOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Compute everything asked for anew, in the place of what is there.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
    store: StoreOption = DEFAULT_STORE,
    dataset_name: DatasetNameOption = None,
    data_root: DataRootOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run each technique's forward pass once an image and store the features.

    What the store has already is not computed again; after an interruption the same command goes on.
    Exit status: 0 done, 1 some images failed, 2 a bad request, 130 interrupted.

    **Examples**

    `featstore extract --dataset toyhorse --techniques prompt,controlnet,lora`

    `featstore extract --dataset folder:photos --techniques basic --model reference --dry-run`

    `featstore extract --dataset toyhorse --techniques prompt --precision int8 --reduce pca:32`

    `featstore extract --dataset toyhorse --techniques prompt,controlnet --workers 2`
    """
    config = ExtractConfig(
        dataset=dataset,
        techniques=techniques,
        store=store,
        model=model,
        timesteps=parse_timesteps(timesteps),
        layers=layers,
        image_size_px=parse_image_size(image_size),
        split=split,
        limit=limit,
        precision=precision,
        reduce=reduce,
        compress=compress,
        batch_size=batch_size,
        device=device,
        steering=SteeringOptions(
            prompt=prompt,
            captions=captions,
            prompt_chunks=prompt_chunks,
            controlnet_scale=controlnet_scale,
            lora_scale=lora_scale,
            ip_adapter_scale=ip_adapter_scale,
            guidance_scale=guidance_scale,
            allow_pickle=allow_pickle,
        ),
        denoise_from=denoise_from,
        noise_ensemble=noise_ensemble,
        seed=seed,
        data_root=data_root,
        dataset_name=dataset_name,
        overwrite=overwrite,
    )
    bar = console.Bar()
    with open_cluster(ClusterConfig(workers=workers, scheduler=scheduler), bar, store=store) as cluster:
        plan = make_plan(config, device=None if cluster is None else cluster.device(device))
        if dry_run and as_json:
            console.print_json(plan.to_json())
            return
        print_plan(plan, to=console.out if dry_run else console.err)
        if dry_run:
            return
        report = execute(plan, bar, cluster=cluster)
    if as_json:
        console.print_json(report.to_json())
    print_report(report)
    if report.failed:
        raise typer.Exit(console.FAILED)


def print_plan(plan: Plan, *, to: Console) -> None:
    """Say what will be computed, how many bytes it takes and about how long."""
    images = _count(len(plan.wanted), "image")
    place = f", model {plan.source.name}, on {plan.device}, store {plan.config.store}"
    console.say((plan.dataset_name, "bold"), f": {images}{place}", to=to)
    for run in plan.runs:
        todo = int(run.todo.sum())
        line = f"  {run.recipe.technique} t{run.recipe.timestep:03d}: "
        line += f"{len(plan.wanted) - todo} cached, {todo} to compute"
        most = "at most " if plan.compressed(run) else ""
        console.say(line + (f", {most}{console.human_bytes(run.bytes_todo)}" if todo else ""), to=to)
        if plan.config.compress and not most:
            console.say("    was created without --compress, and goes on so", to=to)
        if run.recipe.components:
            _print_reduction(run, to=to)
    if plan.passes_todo:
        known = plan.seconds is not None
        time = f"about {console.human_seconds(plan.seconds or 0.0)}" if known else "time not known yet on this machine"
        fitting = f" and {plan.fit_passes} to fit what reduces channels" if plan.fit_passes else ""
        most = "at most " if any(map(plan.compressed, plan.runs)) else ""
        total = f"{_count(plan.passes_todo, 'pass', 'passes')}{fitting}, {most}{console.human_bytes(plan.bytes_todo)}"
        console.say(f"  in all {total}, {time}", to=to)


def _print_reduction(run: PlannedRun, *, to: Console) -> None:
    """Say which layers are reduced, and what that costs."""
    whole = [name for name in run.layers if name not in run.reduced]
    parts = [f"{len(run.reduced)} of {_count(len(run.layers), 'layer')} reduced to {run.recipe.components} channels"]
    if run.fit_images:
        parts.append(f"fitted on {_count(run.fit_images, 'image')}, a pass each")
    if whole:
        parts.append(f"as they are: {', '.join(whole)}")
    console.say(f"    {'; '.join(parts)}", to=to)


def print_report(report: ExtractReport) -> None:
    """Say what was done and what failed, on standard error."""
    if report.passes:
        rate = report.passes / report.seconds
        passes = _count(report.passes, "pass", "passes")
        console.say(f"{passes} stored in {report.seconds:.1f} s ({rate:.1f} a second)")
    else:
        console.say("nothing was stored" if report.failed else "nothing to compute: the store has it all")
    for worker in report.workers:
        one = worker.to_json()
        memory = f"{console.human_bytes(worker.peak_rss_bytes)} of memory"
        if worker.peak_device_bytes is not None:
            memory += f", {console.human_bytes(worker.peak_device_bytes)} of its GPU's"
        passes = _count(worker.passes, "pass", "passes")
        console.say(f"  {worker.name}: {passes}, {one['passes_per_second']:.1f} a second, {memory}")
    for outcome in report.outcomes:
        recipe = outcome.planned.recipe
        for layer, one in outcome.reduced.items():
            line = f"{recipe.technique} t{recipe.timestep:03d} {layer}: {one['channels']} channels reduced to "
            console.say(f"{line}{recipe.components}, {100 * one['explained']:.1f} % of the variance kept")
    failed = list(report.failed.items())
    for key, reason in failed[:_SHOWN_FAILURES]:
        console.say(("failed", "red"), f" {key}: {reason}")
    if len(failed) > _SHOWN_FAILURES:
        console.say(f"and {len(failed) - _SHOWN_FAILURES} more, all of them with --json")
    if failed:
        images = _count(len(failed), "image")
        console.say(f"{images} failed and will be tried again by the next call; all others are stored")


def _count(number: int, noun: str, nouns: str | None = None) -> str:
    return f"{number} {noun if number == 1 else nouns or noun + 's'}"

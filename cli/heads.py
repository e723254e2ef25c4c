"""`featstore train-head`, `featstore evaluate` and `featstore predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featstore.cli import console
from featstore.cli.options import (
    DEFAULT_CACHE_BYTES,
    DEFAULT_STORE,
    AnySeedOption,
    CacheBytesOption,
    CacheOption,
    DataRootOption,
    DatasetNameOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    LayersOption,
    ModelOption,
    SchedulerOption,
    SeedOption,
    StoreOption,
    TechniquesOption,
    TimestepsOption,
    parse_bytes,
    parse_timesteps,
)
from featstore.cli.selection import RunOption
from featstore.errors import BadRequestError
from featstore.pipelines.baseline import BaselineConfig
from featstore.pipelines.cluster.config import ClusterConfig
from featstore.pipelines.evaluate import EvaluateConfig
from featstore.pipelines.evaluate import evaluate as score
from featstore.pipelines.predict import PredictConfig
from featstore.pipelines.predict import predict as use
from featstore.pipelines.reading import BucketConfig
from featstore.pipelines.tasks import TASKS
from featstore.pipelines.train_head import TrainHeadConfig
from featstore.pipelines.train_head import train_head as train

HEADS = "; ".join(f"{', '.join(kind.heads)} for {name}" for name, kind in TASKS.items())

HeadArgument = Annotated[Path, typer.Argument(metavar="HEAD", help="Folder that train-head wrote.", show_default=False)]


@console.handled
def train_head(
    dataset: DatasetOption,
    techniques: TechniquesOption,
    timesteps: TimestepsOption = "50",
    layers: LayersOption = None,
    task: Annotated[
        str, typer.Option("--task", metavar="TASK", help=f"What to train for: {', '.join(TASKS)}.")
    ] = "segmentation",
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="NAME", help=f"Which of its heads; the first is the default: {HEADS}."),
    ] = None,
    assigners: Annotated[
        int, typer.Option("--assigners", metavar="N", min=1, max=16, help="Weight assigners of a bucket.")
    ] = 3,
    per_channel: Annotated[
        bool, typer.Option("--per-channel", help="Weigh each channel apart, and not each technique as a whole.")
    ] = False,
    ensemble: Annotated[int, typer.Option("--ensemble", metavar="N", min=1, max=100, help="Members of the head.")] = 10,
    splits: Annotated[
        int, typer.Option("--splits", metavar="N", min=1, max=100, help="Random splits; the first is the set's own.")
    ] = 5,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", metavar="N", min=1, help="Steps at most, for quick looks.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="NAME",
            help="A network to train on the images themselves, on the same splits, for comparison: resnet50 "
            "(classification).",
        ),
    ] = None,
    baseline_weights: Annotated[
        Path | None,
        typer.Option(
            "--baseline-weights", metavar="FILE", help="Its .safetensors file from timm, to begin with; default: none."
        ),
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out images whose features are missing, e.g. broken ones.")
    ] = False,
    pixels_per_image: Annotated[
        int | None,
        typer.Option(
            "--pixels-per-image",
            metavar="N",
            help="Hold N labelled pixels of each training image, drawn at random, in the place of whole maps: for "
            "pixel heads on thousands of images.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", help="Processes of this machine that gather those pixels.")
    ] = 0,
    scheduler: SchedulerOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the head's files.")] = Path("heads/head"),
    store: StoreOption = DEFAULT_STORE,
    dataset_name: DatasetNameOption = None,
    run: RunOption = None,
    data_root: DataRootOption = None,
    cache: CacheOption = None,
    cache_bytes: CacheBytesOption = DEFAULT_CACHE_BYTES,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a head from stored features; no diffusion model is loaded.

    Several techniques are amalgamated: assigners weigh them position by position. Attention features come
    from the technique with the most parts. The files of the first split's head go to --out.

    **Example**: `featstore train-head --dataset toyhorse --techniques prompt,controlnet,lora --splits 1`
    """
    config = TrainHeadConfig(
        bucket=BucketConfig(
            dataset=dataset,
            techniques=techniques,
            store=store,
            model=model,
            timesteps=parse_timesteps(timesteps),
            layers=layers,
            data_root=data_root,
            dataset_name=dataset_name,
            fingerprints=tuple(run or ()),
            cache=cache,
            cache_bytes=parse_bytes(cache_bytes),
        ),
        task=task,
        head=head,
        per_channel=per_channel,
        assigners=assigners,
        ensemble=ensemble,
        splits=splits,
        max_steps=max_steps,
        baseline=parse_baseline(baseline, baseline_weights),
        skip_missing=skip_missing,
        pixels_per_image=pixels_per_image,
        cluster=ClusterConfig(workers=workers, scheduler=scheduler),
        device=device,
        out=out,
        seed=seed,
    )
    report = train(config, console.Bar())
    if report.cache_use is not None:
        hit, missed = (console.human_bytes(n) for n in (report.cache_use.hit_bytes, report.cache_use.missed_bytes))
        console.say(f"cache: {hit} read from {cache}, {missed} fetched")
    if as_json:
        console.print_json(report.to_json())
        return
    scores = [*report.metrics.items(), *((f"{baseline}: {name}", metric) for name, metric in report.baseline.items())]
    rows = [(name, f"{100 * m.mean:.2f}", f"{100 * m.std:.2f}", len(m.splits)) for name, m in scores]
    console.print_table(f"{report.dataset}: {report.techniques}", ("metric", "mean %", "deviation", "splits"), rows)
    console.say(f"head: {report.head}", to=console.out)


def parse_baseline(name: str | None, weights: Path | None) -> BaselineConfig | None:
    """What --baseline and --baseline-weights say; BadRequestError for weights alone, or what is not there."""
    if name is None:
        if weights is not None:
            raise BadRequestError("--baseline-weights is given without --baseline", hint="add --baseline resnet50")
        return None
    return BaselineConfig(name=name, weights=weights)


@console.handled
def evaluate(
    head: HeadArgument,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="D", help="Data set to score on; default: the one it was trained on."),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="S", help="Images to score on; default test, else val.")
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out images whose features are missing.")
    ] = False,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    dataset_name: DatasetNameOption = None,
    data_root: DataRootOption = None,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Score a trained head from stored features.

    **Example**: `featstore evaluate heads/head --split val`
    """
    config = EvaluateConfig(
        head=head,
        store=store,
        dataset=dataset,
        dataset_name=dataset_name,
        data_root=data_root,
        split=split,
        skip_missing=skip_missing,
        device=device,
    )
    report = score(config, console.Bar())
    if as_json:
        console.print_json(report.to_json())
        return
    rows = [(name, f"{100 * value:.2f}") for name, value in report.summary.items()]
    console.print_table(f"{report.dataset}: {report.images} images of {report.split}", ("metric", "%"), rows)


@console.handled
def predict(
    head: HeadArgument,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--images",
            metavar="PATH",
            help="A folder of images, or a file; may be given again. Default: the test images of its data set.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the predictions.")] = Path("predictions"),
    model: ModelOption = None,
    no_extract: Annotated[
        bool, typer.Option("--no-extract", help="Refuse where features are missing; load no diffusion model.")
    ] = False,
    device: DeviceOption = None,
    store: StoreOption = DEFAULT_STORE,
    data_root: DataRootOption = None,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Use a trained head on images: features that the store lacks are extracted into it first.

    **Example**: `featstore predict heads/head --images ./photos --out labels`
    """
    config = PredictConfig(
        head=head,
        images=tuple(images or ()),
        store=store,
        out=out,
        model=model,
        data_root=data_root,
        extract=not no_extract,
        device=device,
    )
    report = use(config, console.Bar())
    for key, reason in report.failed.items():
        console.say(f"failed: {key}: {reason}")
    if as_json:
        console.print_json(report.to_json())
    else:
        console.say(f"{report.images} images: {report.out}", to=console.out)
    if report.failed:
        raise typer.Exit(1)

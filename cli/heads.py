"""`featstore train-head`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featstore.cli import console
from featstore.cli.options import (
    DEFAULT_CACHE_BYTES,
    DEFAULT_STORE,
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
    SeedOption,
    StoreOption,
    TechniquesOption,
    TimestepsOption,
    parse_bytes,
    parse_timesteps,
)
from featstore.cli.selection import RunOption
from featstore.pipelines.reading import BucketConfig
from featstore.pipelines.train_head import TrainHeadConfig
from featstore.pipelines.train_head import train_head as train


@console.handled
def train_head(
    dataset: DatasetOption,
    techniques: TechniquesOption,
    timesteps: TimestepsOption = "50",
    layers: LayersOption = None,
    task: Annotated[
        str, typer.Option("--task", metavar="TASK", help="What to train for: segmentation.")
    ] = "segmentation",
    assigners: Annotated[
        int, typer.Option("--assigners", metavar="N", min=1, max=16, help="Weight assigners of a bucket.")
    ] = 3,
    ensemble: Annotated[int, typer.Option("--ensemble", metavar="N", min=1, max=100, help="Members of the head.")] = 10,
    splits: Annotated[
        int, typer.Option("--splits", metavar="N", min=1, max=100, help="Random splits; the first is the set's own.")
    ] = 5,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", metavar="N", min=1, help="Steps at most, for quick looks.")
    ] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out images whose features are missing, e.g. broken ones.")
    ] = False,
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

    Several techniques are amalgamated: assigners weigh them pixel by pixel. Attention features come
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
        assigners=assigners,
        ensemble=ensemble,
        splits=splits,
        max_steps=max_steps,
        skip_missing=skip_missing,
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
    rows = [(name, f"{100 * m.mean:.2f}", f"{100 * m.std:.2f}", len(m.splits)) for name, m in report.metrics.items()]
    console.print_table(f"{report.dataset}: {report.techniques}", ("metric", "mean %", "deviation", "splits"), rows)
    console.say(f"head: {report.head}", to=console.out)

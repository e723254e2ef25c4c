"""`featstore show`."""

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
from featstore.pipelines.show import ShowConfig
from featstore.pipelines.show import show as make_picture


@console.handled
def show(
    dataset: DatasetOption,
    techniques: TechniquesOption,
    key: Annotated[list[str] | None, typer.Option("--key", metavar="K", help="An image; may be given again.")] = None,
    count: Annotated[
        int, typer.Option("--count", metavar="N", min=1, max=64, help="How many images, without --key.")
    ] = 4,
    out: Annotated[Path, typer.Option("--out", metavar="PNG", help="The file to write.")] = Path("features.png"),
    model: ModelOption = None,
    timesteps: TimestepsOption = "50",
    layers: LayersOption = None,
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
    """Make a picture of stored features: PCA to RGB with one basis for all runs, and attention by token.

    **Example**: `featstore show --dataset toyhorse --techniques prompt,controlnet --key test-000 --out horse.png`
    """
    bucket = BucketConfig(
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
    )
    path = make_picture(ShowConfig(bucket=bucket, keys=tuple(key or ()), count=count, out=out, seed=seed))
    if as_json:
        console.print_json({"picture": str(path)})
    else:
        console.say(f"wrote {path}", to=console.out)

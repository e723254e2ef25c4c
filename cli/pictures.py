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
    DebugOption,
    JsonOption,
    LayersOption,
    ModelOption,
    SeedOption,
    StoreOption,
    TimestepsOption,
    parse_bytes,
    parse_timesteps,
)
from featstore.cli.selection import RunOption
from featstore.errors import BadRequestError, unknown_name
from featstore.pipelines.reading import BucketConfig
from featstore.pipelines.show import KINDS, ShowConfig, show_assigners
from featstore.pipelines.show import show as make_picture


@console.handled
def show(
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="D", help="A known data set (see `featstore datasets`) or folder:PATH."),
    ] = None,
    techniques: Annotated[
        str | None, typer.Option("--techniques", metavar="T", help="Technique expression as it was extracted.")
    ] = None,
    kind: Annotated[
        str, typer.Option("--kind", metavar="KIND", help=f"What to draw: {', '.join(KINDS)}.")
    ] = "overview",
    head: Annotated[
        Path | None, typer.Option("--head", metavar="DIR", help="Folder of a trained head, for --kind assigners.")
    ] = None,
    key: Annotated[list[str] | None, typer.Option("--key", metavar="K", help="An image; may be given again.")] = None,
    count: Annotated[
        int, typer.Option("--count", metavar="N", min=1, max=64, help="How many images, without --key.")
    ] = 4,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write, .png or .svg.")] = Path(
        "features.png"
    ),
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

    **Examples**

    `featstore show --dataset toyhorse --techniques prompt,controlnet --key test-000 --out horse.png`

    `featstore show --dataset toyhorse --techniques basic,prompt --timesteps 50,200 --kind pca --out grid.svg`

    `featstore show --kind assigners --head heads/all --out weights.png`
    """
    if kind not in KINDS:
        raise unknown_name("kind of picture", kind, KINDS)
    if kind == "assigners":
        if head is None:
            raise BadRequestError("--kind assigners draws a trained head", hint="name its folder: --head DIR")
        _told(show_assigners(head, out), as_json=as_json)
        return
    if dataset is None or techniques is None:
        missing = "--dataset" if dataset is None else "--techniques"
        raise BadRequestError(f"missing option {missing}", hint="`featstore show --help` lists what there is")
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
    config = ShowConfig(bucket=bucket, kind=kind, keys=tuple(key or ()), count=count, out=out, seed=seed)
    _told(make_picture(config), as_json=as_json)


def _told(path: Path, *, as_json: bool) -> None:
    if as_json:
        console.print_json({"picture": str(path)})
    else:
        console.say(f"wrote {path}", to=console.out)

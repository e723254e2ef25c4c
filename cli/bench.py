"""`featstore bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featstore.cli import console
from featstore.cli.options import DEFAULT_STORE, DebugOption, DeviceOption, JsonOption, SeedOption
from featstore.errors import BadRequestError
from featstore.pictures.files import figure_format
from featstore.pipelines.bench import SUBJECTS, USUAL, BenchConfig, tables
from featstore.pipelines.bench import bench as measure
from featstore.pipelines.bench.cluster_picture import save_scaling


@console.handled
def bench(
    subjects: Annotated[
        str, typer.Argument(metavar="SUBJECT,..", help=f"What to measure, of {', '.join(SUBJECTS)}.")
    ] = ",".join(USUAL),
    images: Annotated[
        int | None,
        typer.Option(
            "--images",
            metavar="N",
            min=1,
            help="How many images; default all of toyhorse, 10,000 for scale, 1,000,000 for cluster.",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", min=1, help="Pairs of measurements; medians are shown.")
    ] = 3,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", metavar="N", min=1, help="Steps of the head at most, for quick looks.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", min=1, help="Rows of every forward pass.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=1, help="Most simulated workers of cluster; default 64.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw the scaling of cluster, .png or .svg.")
    ] = None,
    device: DeviceOption = None,
    store: Annotated[
        str,
        typer.Option(
            "--store", envvar="FEATSTORE_STORE", metavar="URL", help="Measure this store's disk; it is not touched."
        ),
    ] = DEFAULT_STORE,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """What limits this machine: each figure beside what it is measured against, in one run.

    **Example**: `featstore bench extract --repeats 5`
    """
    asked = tuple(part.strip() for part in subjects.split(","))
    if picture is not None:
        figure_format(picture)
        if "cluster" not in asked:
            raise BadRequestError(
                "--picture is of the scaling of a cluster", hint="featstore bench cluster --picture .."
            )
    config = BenchConfig(
        images=images,
        repeats=repeats,
        max_steps=max_steps,
        batch_size=batch_size,
        workers=workers,
        device=device,
        beside=Path(store),
        seed=seed,
    )
    results = measure(asked, config, console.Bar())
    if picture is not None:
        save_scaling(picture, results["cluster"])
    if as_json:
        console.print_json(results)
        return
    for subject, figures in results.items():
        for title, columns, cells in tables(subject, figures):
            console.print_table(title, columns, cells)
        rows = [
            (name.replace("_", " "), _shown(value))
            for name, value in figures.items()
            if not isinstance(value, list | dict)
        ]
        if rows:
            console.print_table(subject, ("figure", "value"), rows)


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

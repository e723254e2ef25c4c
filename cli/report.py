"""`featstore report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import featstore.store
from featstore.cli import console
from featstore.cli.options import DEFAULT_STORE, DataRootOption, DebugOption, JsonOption, SeedOption
from featstore.errors import NotFoundError
from featstore.pipelines.report import ReportConfig, make_report
from featstore.pipelines.report.stores import Sampling


@console.handled
def report(
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            envvar="FEATSTORE_STORE",
            metavar="URL",
            help=f"The feature store; default ./{DEFAULT_STORE} where it is there.",
            show_default=False,
        ),
    ] = None,
    head: Annotated[
        list[Path] | None, typer.Option("--head", metavar="DIR", help="Folder of a trained head; may be repeated.")
    ] = None,
    gate: Annotated[
        Path | None, typer.Option("--gate", metavar="FILE", help="What `featstore gate` wrote: gate.json.")
    ] = None,
    experiment: Annotated[
        Path | None, typer.Option("--experiment", metavar="DIR", help="Folder of an experiment's results.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The HTML file to write.")] = Path("report.html"),
    images: Annotated[
        int, typer.Option("--images", metavar="N", min=0, max=64, help="Images of each data set to show; 0: none.")
    ] = 4,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            metavar="D",
            help="Where the images themselves are, e.g. folder:PATH; known data sets are found by their name.",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option("--title", metavar="TEXT", help="Title of the page.")] = None,
    data_root: DataRootOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write one HTML file: what a store holds and looks like, scores of heads, a gate, an experiment.

    The file holds its pictures, loads nothing from anywhere, and reads well on a phone and in the dark.

    **Example**: `featstore report --store features.zarr --head heads/all --out report.html`
    """
    if store is None and (not (head or gate or experiment) or _there(DEFAULT_STORE)):
        store = DEFAULT_STORE
    sampling = Sampling(images=images, dataset=dataset, data_root=data_root, seed=seed)
    config = ReportConfig(
        store=store,
        heads=tuple(head or ()),
        gate=gate,
        experiment=experiment,
        sampling=sampling,
        title=title,
        out=out,
    )
    result = make_report(config)
    if as_json:
        console.print_json(result.to_json())
    else:
        console.say(f"wrote {result.path}, {console.human_bytes(result.size_bytes)}", to=console.out)


def _there(store: str) -> bool:
    try:
        featstore.store.open(store)
    except NotFoundError:
        return False
    return True

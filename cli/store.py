"""`featstore info` and `featstore verify`: what a store holds, and whether it is whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

import featstore.store
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
from featstore.store.catalog import describe
from featstore.store.differences import in_words
from featstore.store.verify import verify as verify_store

DatasetArgument = Annotated[
    str | None, typer.Argument(metavar="DATASET", help="Only this data set.", show_default=False)
]


@console.handled
def info(
    dataset: DatasetArgument = None,
    techniques: TechniquesFilter = None,
    model: ModelFilter = None,
    timesteps: TimestepsFilter = None,
    layers: LayersFilter = None,
    run: RunFilter = None,
    where: WhereFilter = None,
    full: Annotated[
        bool, typer.Option("--long", help="Say of each run who made it, when, on what, and where it lies.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """What the store holds: runs, layers, committed of total, bytes, and in what runs of one name differ.

    **Examples**

    `featstore info toyhorse --store features.zarr`

    `featstore info --technique controlnet --where seed=0 --long`
    """
    query = selection.query(techniques, model, timesteps, layers, run, where)
    content = describe(featstore.store.open(store), dataset, query)
    if as_json:
        console.print_json(content)
        return
    console.say((content["store"], "bold"), f": {console.human_bytes(content['bytes'])}", to=console.out)
    for entry in content["datasets"]:
        title = f"{entry['name']}: {entry['images']} images"
        if full:
            console.say((title, "bold"), to=console.out)
            for one in entry["runs"]:
                _print_run(one)
        else:
            _print_runs(title, entry["runs"])
    if query and not content["datasets"]:
        console.say("no run has all of that", to=console.out)


def _print_runs(title: str, runs: Sequence[Mapping[str, Any]]) -> None:
    """A line a run."""
    several = any(run["differs"] for run in runs)
    rows = [
        (
            run["model"],
            run["technique"],
            run["timestep"],
            f"{run['committed']} of {run['images']}",
            len(run["layers"]),
            console.human_bytes(sum(layer["bytes"] for layer in run["layers"].values())),
            run["fingerprint"][:8],
            *((in_words(run["differs"]),) if several else ()),
        )
        for run in runs
    ]
    columns = ("model", "technique", "t", "images", "layers", "bytes", "fingerprint")
    console.print_table(title, (*columns, "differs") if several else columns, rows)


def _print_run(run: Mapping[str, Any]) -> None:
    """All that there is to say of one run."""

    def line(name: str, text: str) -> None:
        console.say((f"    {name}: ", "dim"), text, to=console.out)

    console.say("  ", (run["path"], "bold"), to=console.out)
    line("fingerprint", run["fingerprint"])
    line("what", f"{run['technique']} at {run['timestep']}, {run['model']}")
    if run["differs"]:
        line("differs from others of that name", in_words(run["differs"]))
    line("images", f"{run['committed']} of {run['images']}")
    for name, layer in run["layers"].items():
        shape = " x ".join(map(str, layer["shape"]))
        line(name, f"{shape} {layer['dtype']}, {console.human_bytes(layer['bytes'])}")
    for entry in run["provenance"]:
        line("made", _maker(entry))


def _maker(entry: Mapping[str, Any]) -> str:
    """``by ada on host7 (cuda) 2026-01-01T00:00:00+00:00 with torch 2.10, ..; layers a, b`` as far as it is said."""
    words = [
        f"{word} {entry[name]}"
        for word, name in (("by", "user"), ("on", "host"), ("with", "device"))
        if entry.get(name)
    ]
    packages = entry.get("packages")
    versions = [f"{name} {version}" for name, version in packages.items()] if isinstance(packages, Mapping) else []
    versions += [f"Python {entry['python']}"] if entry.get("python") else []
    named = {"user", "host", "device", "created", "packages", "python", "layers"}
    parts = [
        " ".join(words),
        str(entry.get("created") or ""),
        ", ".join(versions),
        in_words({name: value for name, value in entry.items() if name not in named and value is not None}),
        f"layers {', '.join(map(str, entry['layers']))}" if isinstance(entry.get("layers"), list) else "",
    ]
    return "; ".join(part for part in parts if part) or "not said"


@console.handled
def verify(
    dataset: DatasetArgument = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Uncommit what is broken; the next extract makes it anew.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Read everything and check it: checksums, completeness, NaN and inf, recipe digests.

    Exit status 1 if anything is corrupt, incomplete or not finite.

    **Example**: `featstore verify --store features.zarr --repair`
    """
    opened = featstore.store.open(store)
    if repair:
        opened = featstore.store.create(store)  # for writing; only now, as it would make one that is not there
    bar = console.Bar()
    done: int | None = None

    def progress(current: int, total: int) -> None:
        nonlocal done
        if done is None:
            bar.start("verifying", total, "blocks")
        bar.advance(current - (done or 0))
        done = current

    try:
        report = verify_store(opened, dataset=dataset, repair=repair, progress=progress)
    finally:
        bar.stop()
    if as_json:
        console.print_json(report.to_json())
    else:
        read = f"{report.checked_images} images, {console.human_bytes(report.checked_bytes)} checked"
        console.say(read, to=console.out)
        for kind in ("corrupt", "incomplete", "nonfinite"):
            for line in getattr(report, kind):
                console.say(f"{kind}: {line}", to=console.out)
        if report.ok:
            verdict = "whole"
        elif repair:
            verdict = "it was not whole; what was broken is uncommitted, extract again"
        else:
            verdict = "not whole"
        console.say(verdict, to=console.out)
    if not report.ok:
        raise typer.Exit(console.FAILED)

"""`featstore datasets` and `featstore models`: what is known, where it is looked for, how it is fetched."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

import featstore.datasets
import featstore.models
from featstore.cli import console
from featstore.cli.options import (
    DEFAULT_STORE,
    AnySeedOption,
    AnyStoreOption,
    DataRootOption,
    DebugOption,
    ImageSizeOption,
    JsonOption,
    parse_image_size,
)
from featstore.datasets import lock_file, resolve_data_root
from featstore.datasets.archives import ARCHIVES, Archive
from featstore.errors import BadRequestError, NotFoundError
from featstore.pipelines.fetch import fetch
from featstore.pipelines.fetch_plan import FetchPlan, make_plan

_LISTED_LAYERS = 12


@console.handled
def datasets(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this data set.", show_default=False)] = None,
    data_root: DataRootOption = None,
    store: AnyStoreOption = DEFAULT_STORE,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Known data sets, where each looks for its files, how to get them, what is there.

    `datasets fetch NAME` downloads one.

    **Example**: `featstore datasets horse21 --data-root ~/data`
    """
    entries = featstore.datasets.DATASETS
    chosen = {name: entries[name]} if name is not None else dict(entries)
    content = {
        key: {
            "title": entry.title,
            "where": str(entry.where(data_root)) if entry.where(data_root) is not None else None,
            "present": entry.present(data_root),
            "how_to_get": entry.how_to_get,
            "archive": archive.url if (archive := ARCHIVES.get(key)) else None,
        }
        for key, entry in chosen.items()
    }
    if as_json:
        console.print_json({"datasets": content})
        return
    rows = [
        (key, "yes" if value["present"] else "no", value["title"], value["where"] or "-")
        for key, value in content.items()
    ]
    console.print_table("data sets", ("name", "there", "what", "where"), rows)
    for key, value in content.items():
        if name is not None or not value["present"]:
            fetched = f"`featstore datasets fetch {key}`, or " if value["archive"] else ""
            console.say(f"{key}: {fetched}{value['how_to_get']}", to=console.out)


@console.handled
def datasets_fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The data set to fetch.", show_default=False)],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be downloaded, and ask no server.")
    ] = False,
    data_root: DataRootOption = None,
    store: AnyStoreOption = DEFAULT_STORE,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Download a data set's files to where they are looked for.

    An interrupted download goes on where it was left. Archives are compared with digests that are known; where none
    is, the first download is trusted, written to `datasets.lock` beside the data, and later ones have to be equal.
    Data sets that come in one archive are unpacked together.

    **Examples**

    `featstore datasets fetch horse21`

    `featstore datasets fetch cifar10 --data-root ~/data --dry-run`
    """
    plan = make_plan(name, data_root)
    if plan.archive is not None:
        _say_plan(plan, plan.archive, to=console.out if dry_run and not as_json else console.err)
    if dry_run and as_json:
        console.print_json(plan.to_json())
    if dry_run and (plan.archive is not None or as_json):
        return
    report = fetch(plan, console.Bar())
    if as_json:
        console.print_json(report.to_json())
        return
    if not report.fetched:
        where = "it needs no files" if report.where is None else f"in {report.where}"
        console.say(f"{name} is there already: {where}", to=console.out)
    for folder in report.folders:
        console.say(f"{name}: {folder}", to=console.out)
    if report.compared == "nothing":
        lock = resolve_data_root(data_root) / lock_file.NAME
        console.say(f"no digest of this archive is known: the one of this download is in {lock}", to=console.out)


def _say_plan(plan: FetchPlan, archive: Archive, *, to: Console) -> None:
    size, unpacked = console.human_bytes(archive.download_bytes), console.human_bytes(archive.unpacked_bytes)
    here = f", {console.human_bytes(plan.have_bytes)} of it are here" if plan.have_bytes else ""
    console.say(f"{archive.url}: about {size}{here}, about {unpacked} unpacked", to=to)
    others = [name for name in archive.folders if name != plan.dataset]
    beside = f"; {', '.join(others)} come with it" if others else ""
    console.say(f"into {plan.data_root / archive.folders[plan.dataset]}{beside}", to=to)


@console.handled
def models(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A known model, a diffusers folder or a Hub id.", show_default=False),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="List the layers with their shapes.")] = False,
    image_size: ImageSizeOption = None,
    store: AnyStoreOption = DEFAULT_STORE,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Known models, where weights are looked for, layers with shapes and presets. No weights are needed or fetched.

    **Example**: `featstore models sd15 --layers`
    """
    if name is None:
        _list_models(as_json)
    else:
        _show_model(name, image_size, layers=layers, as_json=as_json)


def _list_models(as_json: bool) -> None:
    content = {
        key: {
            "title": entry.title,
            "family": entry.family,
            "where": str(entry.where()),
            "there": entry.there(),
            "present": entry.present(),
            "hub": dict(entry.hub),
            "how_to_get": entry.how(),
        }
        for key, entry in featstore.models.MODELS.items()
    }
    if as_json:
        console.print_json({"models": content})
        return
    rows = [
        (key, value["there"] or "no", str(value["family"]).partition(" (")[0], value["title"], value["where"])
        for key, value in content.items()
    ]
    console.print_table("models", ("name", "there", "family", "what", "where"), rows)
    console.say(
        "also any model of these families: --model PATH (a folder in diffusers' layout) or OWNER/NAME@REVISION (of the "
        "Hugging Face Hub)",
        to=console.out,
    )


def _show_model(name: str, image_size: str | None, *, layers: bool, as_json: bool) -> None:
    source = featstore.models.describe(name)
    entry = featstore.models.MODELS.get(name) if name in featstore.models.MODELS else None
    asked = parse_image_size(image_size)
    size = source.default_image_size_px if asked is None else asked
    height, width = size if isinstance(size, tuple) else (size, size)
    source.check_image_size(height, width)
    shapes = source.layer_names(height, width)
    problem = how_to_get = digest = None
    try:
        digest = source.weights_digest
    except (BadRequestError, NotFoundError) as error:
        problem, how_to_get = str(error), error.hint
    detail = {
        "model": source.name,
        "title": entry.title if entry else None,
        "family": entry.family if entry else None,
        "where": str(source.folder if source.absent is None or entry is None else entry.where()),
        "hub": dict(entry.hub) if entry else {},
        "weights_digest": digest,
        "problem": problem,
        "how_to_get": entry.how() if entry else how_to_get,
        "image_size_px": [height, width],
        "techniques": {key: list(parts) for key, parts in source.own_parts.items()},
        "presets": {key: list(value) for key, value in source.presets.items()},
        "layers": {key: list(shape) for key, shape in shapes.items()},
    }
    if as_json:
        console.print_json(detail)
        return
    title = f", {entry.title}" if entry else ""
    console.say((source.name, "bold"), f"{title}: {height} x {width} px", to=console.out)
    console.say(f"weights: {problem or f'{source.folder}, digest {str(digest)[:16]}'}", to=console.out)
    if problem and (how_to_get or entry):
        console.say(f"how to get them: {detail['how_to_get']}", to=console.out)
    for part, hub in (entry.hub if entry else {}).items():
        console.say(f"{part}: {hub} on the Hugging Face Hub", to=console.out)
    steered = [f"{key} ({', '.join(parts)})" if parts else key for key, parts in source.own_parts.items()]
    console.say(f"techniques: {', '.join(steered)}", to=console.out)
    for key, names in source.presets.items():
        listed = f"{len(names)} layers" if len(names) > _LISTED_LAYERS else ", ".join(names)
        console.say(f"preset {key}: {listed}", to=console.out)
    if layers:
        console.print_table(
            f"layers at {height} x {width} px",
            ("name", "channels", "height", "width"),
            [(key, *shape) for key, shape in shapes.items()],
        )

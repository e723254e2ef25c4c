"""`featstore import-npy` and `featstore export`: features in and out of a store as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from featstore.cli import console
from featstore.cli.options import (
    DEFAULT_STORE,
    AnySeedOption,
    DataRootOption,
    DatasetNameOption,
    DatasetOption,
    DebugOption,
    ImageSizeOption,
    JsonOption,
    LayersOption,
    ModelOption,
    StoreOption,
    TechniquesOption,
    TimestepsOption,
    parse_image_size,
    parse_timesteps,
)
from featstore.errors import BadRequestError
from featstore.pipelines import export as exports
from featstore.pipelines import npy_import

_SHOWN = 20

SplitOption = Annotated[str | None, typer.Option("--split", metavar="S", help="Only this split's images.")]
LimitOption = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N images.")]


@console.handled
def import_npy(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of .npy files, or an export to .npy.", show_default=False)
    ],
    dataset: DatasetOption,
    model: Annotated[
        str | None, typer.Option("--model", metavar="M", help="Name of the model that made the features.")
    ] = None,
    technique: Annotated[
        str | None, typer.Option("--technique", metavar="T", help="Technique expression of the pass, e.g. controlnet.")
    ] = None,
    timestep: Annotated[
        int | None, typer.Option("--timestep", metavar="T", help="What the UNet was fed, 0..999.")
    ] = None,
    image_size: ImageSizeOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="The text of the pass.")] = None,
    denoise_from: Annotated[
        int | None, typer.Option("--denoise-from", metavar="T", help="Timestep at which a short denoising began.")
    ] = None,
    compute_dtype: Annotated[
        str | None, typer.Option("--compute-dtype", metavar="TYPE", help="What the model computed in; default float16.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option("--layout", metavar="L", help="layer-first, image-first or aggregate; default: what fits."),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option("--names", metavar="N", help="How files name images, stem or position; default: what fits."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="NAME,..", help="Only these layers, by their names in the store.")
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option("--rename", metavar="OLD=NEW", help="Another name for a layer; may be repeated.")
    ] = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", metavar="TYPE", help="float16, float32 or int8, on disk; default: as the files."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read the files and print the plan only.")] = False,
    store: StoreOption = DEFAULT_STORE,
    dataset_name: DatasetNameOption = None,
    data_root: DataRootOption = None,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Bring features that other code left as .npy files into the store.

    Layouts and names of generic-diffusion-feature are recognised, and what `featstore export --format npy` wrote. What
    the store has already is not copied again. Exit status: 0 done, 1 some images have no usable file or some files no
    image, 2 a bad request.

    **Examples**

    `featstore import-npy features --dataset horse21 --model sd15 --technique prompt --timestep 51 --image-size 512`

    `featstore import-npy exported --dataset toyhorse`
    """
    config = npy_import.ImportConfig(
        folder=folder,
        dataset=dataset,
        store=store,
        model=model,
        technique=technique,
        timestep=timestep,
        image_size_px=parse_image_size(image_size),
        prompt=prompt,
        denoise_from=denoise_from,
        compute_dtype=compute_dtype,
        layout=layout,
        names=names,
        layers=None if layers is None else tuple(name.strip() for name in layers.split(",")),
        renamed=parse_renamed(rename or ()),
        precision=precision,
        split=split,
        limit=limit,
        data_root=data_root,
        dataset_name=dataset_name,
    )
    bar = console.Bar()
    plan = npy_import.make_plan(config, bar)
    if dry_run and as_json:
        console.print_json(plan.to_json())
        return
    _print_import_plan(plan, to=console.out if dry_run else console.err)
    if dry_run:
        return
    report = npy_import.execute(plan, bar)
    if as_json:
        console.print_json(report.to_json())
    _print_import_report(report, to=console.err if as_json else console.out)
    if not report.complete:
        raise typer.Exit(console.FAILED)


@console.handled
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.", show_default=False)],
    dataset: DatasetOption,
    techniques: TechniquesOption,
    form: Annotated[str, typer.Option("--format", metavar="F", help="npy, safetensors or datasets (Hugging Face).")],
    model: ModelOption = None,
    timesteps: TimestepsOption = "50",
    fingerprint: Annotated[
        str | None,
        typer.Option("--fingerprint", metavar="HEX", help="First digits, where several runs are called the same."),
    ] = None,
    layers: LayersOption = None,
    split: SplitOption = None,
    limit: LimitOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export of that name.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    store: StoreOption = DEFAULT_STORE,
    dataset_name: DatasetNameOption = None,
    data_root: DataRootOption = None,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write features of the store as files: .npy, safetensors, or a data set of Hugging Face `datasets`.

    A folder a run; it appears when all of it is written. int8 comes out as float16. Exit status: 0 done, 1 some images
    have no features and were left out, 2 a bad request.

    **Example**: `featstore export exported --dataset toyhorse --techniques prompt,controlnet --format safetensors`
    """
    plan = exports.make_plan(
        exports.ExportConfig(
            out=out,
            dataset=dataset,
            techniques=techniques,
            format=form,
            store=store,
            model=model,
            timesteps=parse_timesteps(timesteps),
            fingerprint=fingerprint,
            layers=layers,
            split=split,
            limit=limit,
            overwrite=overwrite,
            data_root=data_root,
            dataset_name=dataset_name,
        )
    )
    if dry_run and as_json:
        console.print_json(plan.to_json())
        return
    _print_export_plan(plan, to=console.out if dry_run else console.err)
    if dry_run:
        return
    report = exports.execute(plan, console.Bar())
    if as_json:
        console.print_json(report.to_json())
    written = f"{console.human_bytes(report.bytes)} written in {console.human_seconds(report.seconds)} to {out}"
    console.say(written, to=console.err if as_json else console.out)
    for run in plan.runs:
        _print_some("left out, as it has no features of today's image", dict.fromkeys(run.left_out, run.folder))
    if not report.complete:
        raise typer.Exit(console.FAILED)


def parse_renamed(pairs: Sequence[str]) -> dict[str, str]:
    """``["attn=attn-up"]`` as a dictionary.

    Raises:
        BadRequestError: if one is no such pair, or a name is given twice.
    """
    renamed: dict[str, str] = {}
    for pair in pairs:
        old, equals, new = pair.partition("=")
        if not (old and equals and new) or old in renamed:
            raise BadRequestError(f"--rename {pair!r} gives no layer another name", hint="as in --rename attn=attn-up")
        renamed[old] = new
    return renamed


def _print_import_plan(plan: npy_import.ImportPlan, *, to: Console) -> None:
    """Say what the folder was taken for, what will be copied, and how many bytes it takes."""
    found, recipe = plan.survey.assigned, plan.recipe
    console.say((str(plan.folder), "bold"), f": {found.layout}, images named by {found.names}", to=to)
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in plan.layers.items())
    console.say(f"  layers: {shapes}", to=to)
    steering = f"{recipe.model} {recipe.technique} t{recipe.timestep:03d}"
    counts = f"{plan.reused} there already, {len(plan.rows_todo)} to import"
    size = f", {console.human_bytes(plan.bytes_todo)} in {recipe.precision}" if plan.rows_todo else ""
    console.say(f"  {steering} of {plan.dataset_name}, run {recipe.fingerprint[:8]}: {counts}{size}", to=to)
    for note in plan.notes:
        console.say(("note: ", "dim"), note, to=to)
    for what, number in (
        ("images cannot be imported", len(plan.survey.failed)),
        ("images have no file", len(plan.survey.without(plan.wanted))),
        ("files are of no image", len(found.strangers)),
    ):
        if number:
            console.say(f"  {number} {what}", to=to)


def _print_import_report(report: npy_import.ImportReport, *, to: Console) -> None:
    """Say what was done, and on standard error what was not."""
    plan = report.plan
    console.say(f"{report.imported} images imported in {console.human_seconds(report.seconds)}", to=to)
    _print_some("failed", report.failed)
    _print_some("without a file", dict.fromkeys(plan.keys(plan.survey.without(plan.wanted)), ""))
    _print_some("of no image", dict.fromkeys(plan.survey.assigned.strangers, ""))


def _print_export_plan(plan: exports.ExportPlan, *, to: Console) -> None:
    """Say what will be written, and how many bytes it takes."""
    size = console.human_bytes(plan.bytes)
    console.say((str(plan.config.out), "bold"), f": {plan.config.format}, about {size}", to=to)
    for run in plan.runs:
        recipe = run.run.recipe
        line = f"  {recipe.model} {recipe.technique} t{recipe.timestep:03d} of {plan.dataset}: {len(run.rows)} images, "
        line += f"{len(run.layers)} layers, {console.human_bytes(run.bytes)}"
        console.say(line + (f"; {len(run.left_out)} left out" if run.left_out else ""), to=to)


def _print_some(what: str, reasons: Mapping[str, str]) -> None:
    for name, reason in list(reasons.items())[:_SHOWN]:
        console.say((what, "red"), f": {name}" + (f": {reason}" if reason else ""))
    if len(reasons) > _SHOWN:
        console.say(f"and {len(reasons) - _SHOWN} more, all of them with --json")

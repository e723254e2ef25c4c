"""`featstore train-lora`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from featstore.cli import console
from featstore.cli.options import (
    DEFAULT_STORE,
    AnyStoreOption,
    DataRootOption,
    DatasetNameOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    ImageSizeOption,
    JsonOption,
    ModelOption,
    SeedOption,
    parse_image_size,
)
from featstore.pipelines.lora_plan import LoraPlan, TrainLoraConfig, make_lora_plan
from featstore.pipelines.train_lora import TrainLoraReport, execute_lora


@console.handled
def train_lora(
    dataset: DatasetOption,
    model: ModelOption = None,
    images: Annotated[int, typer.Option("--images", metavar="N", help="Images of the random sample.")] = 30,
    overfit: Annotated[
        bool, typer.Option("--overfit", help="Train three times as long, to the end; writes the variant lora:overfit.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", help="Steps at most; default 100 an image, up to 3000.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="S", help="Split to draw from; default train where there is one.")
    ] = None,
    captions: Annotated[
        str,
        typer.Option("--captions", metavar="KIND", help="Texts: empty, tags, sentences, or a caption file."),
    ] = "empty",
    rank: Annotated[int, typer.Option("--rank", metavar="N", help="Rank of the added matrices.")] = 64,
    alpha: Annotated[float, typer.Option("--alpha", metavar="X", help="What is added counts alpha / rank.")] = 32.0,
    learning_rate: Annotated[float, typer.Option("--learning-rate", metavar="X", help="Of the UNet's part.")] = 1e-4,
    text_learning_rate: Annotated[
        float, typer.Option("--text-learning-rate", metavar="X", help="Of the text encoders' part; 0 leaves them.")
    ] = 5e-5,
    schedule: Annotated[
        str, typer.Option("--schedule", metavar="KIND", help="Of the rates: constant, or cosine down to 0.")
    ] = "constant",
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Images of one step.")] = 1,
    image_size: ImageSizeOption = None,
    device: DeviceOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder to write to, in place of the one `lora` uses.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a LoRA that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
    store: AnyStoreOption = DEFAULT_STORE,
    dataset_name: DatasetNameOption = None,
    data_root: DataRootOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a LoRA on a few images of a data set, for the technique `lora`.

    Low-rank weights of the attention of UNet and text encoders, trained on a random sample of the training images;
    other images of the set say when to stop. It is written to weights/MODEL/loras/DATASET (below $FEATSTORE_WEIGHTS
    if that is set), where `lora` finds it as the data set's default; a LoRA that comes with a model stays its own
    data set's default. --out writes it to any other folder, to be used as lora:DIR.

    **Examples**

    `featstore train-lora --dataset folder:photos --model reference`

    `featstore train-lora --dataset horse21 --model sd15 --overfit --captions tags --dry-run`
    """
    config = TrainLoraConfig(
        dataset=dataset,
        model=model,
        images=images,
        overfit=overfit,
        steps=steps,
        split=split,
        captions=captions,
        rank=rank,
        alpha=alpha,
        learning_rate=learning_rate,
        text_learning_rate=text_learning_rate,
        schedule=schedule,
        batch_size=batch_size,
        image_size_px=parse_image_size(image_size),
        device=device,
        seed=seed,
        data_root=data_root,
        dataset_name=dataset_name,
        out=out,
        overwrite=overwrite,
    )
    plan = make_lora_plan(config)
    if dry_run and as_json:
        console.print_json(plan.to_json())
        return
    print_plan(plan, to=console.out if dry_run else console.err)
    if dry_run:
        return
    report = execute_lora(plan, console.Bar())
    if as_json:
        console.print_json(report.to_json())
        return
    print_report(report, plan)


def print_plan(plan: LoraPlan, *, to: Console) -> None:
    """Say what will be trained, for how long, and how large the result is."""
    console.say(
        (plan.dataset_name, "bold"),
        f": {plan.images} of {len(plan.candidates)} images, {plan.height_px} x {plan.width_px} px, "
        f"model {plan.source.name}, on {plan.device}",
        to=to,
    )
    until = ", or until the loss on held-out images no longer falls" if plan.stops_early else ""
    rows = plan.config.batch_size
    console.say(f"  {plan.steps} steps of {rows} image{'' if rows == 1 else 's'}{until}", to=to)
    size = console.human_bytes(plan.file_bytes)
    console.say(f"  {plan.parameters:,} trainable parameters, {size}, to {plan.file}", to=to)


def print_report(report: TrainLoraReport, plan: LoraPlan) -> None:
    """Say how it went, and how the LoRA is used."""
    course = report.course
    time = console.human_seconds(report.seconds)
    kept = "" if course.kept_step == course.steps else f"; those of step {course.kept_step} are kept"
    console.say(f"{course.steps} steps on {report.images} images in {time}{kept}")
    rows = [("training images", f"{course.before:.4f}", f"{course.after:.4f}")]
    if course.held_out_before is not None and course.held_out_after is not None:
        rows.append(("held-out images", f"{course.held_out_before:.4f}", f"{course.held_out_after:.4f}"))
    console.print_table("loss of the predicted noise", ("", "without", "with the LoRA"), rows)
    console.say(f"lora: {report.lora}", to=console.out)
    words = ["featstore", "extract", "--dataset", plan.config.dataset, "--techniques", report.technique]
    words += [] if plan.config.model is None else ["--model", plan.config.model]
    console.say(f"use it: {shlex.join(words)}")

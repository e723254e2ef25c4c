"""`featstore caption`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from featstore.cli import console
from featstore.cli.options import (
    DEFAULT_STORE,
    AnySeedOption,
    AnyStoreOption,
    DataRootOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    JsonOption,
)
from featstore.pipelines.caption import CaptionConfig, CaptionReport, execute_captions, plan_captions

_SHOWN_FAILURES = 20


@console.handled
def caption(
    dataset: DatasetOption,
    captioner: Annotated[
        str,
        typer.Option(
            "--captioner", metavar="PATH_OR_ID", help="A BLIP, BLIP-2, GIT or Kosmos-2 folder, or its id on the Hub."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The caption file.")] = Path("captions.json"),
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", metavar="TEXT", help="What the captioner is asked, or how texts begin; default: its own."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option("--split", metavar="S", help="Only this split's images.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="Only the first N images.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Images at once.")] = 8,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", help="Where a text is broken off.")
    ] = 64,
    device: DeviceOption = None,
    store: AnyStoreOption = DEFAULT_STORE,
    data_root: DataRootOption = None,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a text for each image with a captioner, into the file that `extract --captions` takes.

    Texts that the file has already stay, unless their image has changed; after an interruption the same command goes
    on. It may be written or corrected by hand. Exit status: 0 done, 1 some images failed, 2 a bad request.

    **Example**: `featstore caption --dataset folder:photos --captioner Salesforce/blip-image-captioning-base`
    """
    config = CaptionConfig(
        dataset=dataset,
        captioner=captioner,
        out=out,
        prompt=prompt,
        split=split,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        data_root=data_root,
    )
    plan = plan_captions(config)
    todo = len(plan.todo)
    line = f": {len(plan.wanted) - todo} of {len(plan.wanted)} images have a text in {out}, {todo} to write"
    console.say((plan.dataset.info.name, "bold"), f"{line}, captioner {captioner}, on {plan.device}")
    report = execute_captions(plan, console.Bar())
    if as_json:
        console.print_json(report.to_json())
    _print_report(report)
    if report.failed:
        raise typer.Exit(console.FAILED)


def _print_report(report: CaptionReport) -> None:
    """Say what was done, what failed and how to go on, on standard error."""
    config = report.plan.config
    if report.captioned:
        rate = report.captioned / report.seconds
        console.say(f"{report.captioned} texts written in {report.seconds:.1f} s ({rate:.1f} a second)")
    failed = list(report.failed.items())
    for key, reason in failed[:_SHOWN_FAILURES]:
        console.say(("failed", "red"), f" {key}: {reason}")
    if len(failed) > _SHOWN_FAILURES:
        console.say(f"and {len(failed) - _SHOWN_FAILURES} more, all of them with --json")
    words = ["--dataset", config.dataset, "--techniques", "prompt:caption", "--captions", str(config.out)]
    words += ["--split", config.split] if config.split is not None else []
    words += ["--limit", str(config.limit)] if config.limit is not None else []
    if len(failed) < len(report.plan.wanted):
        console.say(f"use it: {shlex.join(['featstore', 'extract', *words])}")

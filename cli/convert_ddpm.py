"""`featstore convert-ddpm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featstore.cli import console
from featstore.cli.options import DEFAULT_STORE, AnySeedOption, AnyStoreOption, DebugOption, JsonOption
from featstore.pipelines.convert_ddpm import ConvertDDPMConfig
from featstore.pipelines.convert_ddpm import convert_ddpm as convert


@console.handled
def convert_ddpm(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="State dict of guided-diffusion's UNet, e.g. lsun_horse.pt.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write; it must not exist.")],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read the checkpoint though it is a pickle; tensors only.")
    ] = False,
    image_size: Annotated[
        int, typer.Option("--image-size", metavar="PX", min=1, help="Side of the images the model was trained on.")
    ] = 256,
    head_channels: Annotated[
        int, typer.Option("--head-channels", metavar="N", min=1, help="Channels of an attention head.")
    ] = 64,
    store: AnyStoreOption = DEFAULT_STORE,
    seed: AnySeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a guided-diffusion checkpoint (LSUN, FFHQ; those of ddpm-segmentation) a folder that `--model` takes.

    **Example**: `featstore convert-ddpm lsun_horse.pt weights/ddpm-horse --allow-pickle`
    """
    report = convert(
        ConvertDDPMConfig(
            checkpoint=checkpoint,
            folder=folder,
            allow_pickle=allow_pickle,
            image_size_px=image_size,
            head_channels=head_channels,
        )
    )
    detail = report.to_json()
    if as_json:
        console.print_json(detail)
        return
    widths = ", ".join(str(width) for width in detail["widths"])
    attention = ", ".join(str(side) for side in detail["attention_at_px"]) or "no"
    made = f": {detail['parameters'] / 1e6:.1f} M weights, widths {widths}, attention at {attention} px"
    console.say((str(report.folder), "bold"), made, to=console.out)
    console.say(f"use it: --model {detail['model']} --timesteps 50,150,250", to=console.out)

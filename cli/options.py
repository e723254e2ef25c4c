"""Options that several commands share, declared once."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from featstore.errors import BadRequestError

StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="FEATSTORE_STORE",
        metavar="URL",
        help="The feature store: a path, s3://, gs://, az:// or http://.",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print exactly one JSON object on standard output; all else goes to standard error."),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
AnyStoreOption = Annotated[
    str, typer.Option("--store", envvar="FEATSTORE_STORE", hidden=True, help="Accepted by every command; not used.")
]
"""For commands that touch no store, so that a script may give ``--store`` to all."""
AnySeedOption = Annotated[int, typer.Option("--seed", min=0, hidden=True, help="Accepted by every command; not used.")]
"""For commands in which nothing is random."""
SeedOption = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of everything random.")]
DatasetOption = Annotated[
    str, typer.Option("--dataset", metavar="D", help="A known data set (see `featstore datasets`) or folder:PATH.")
]
DatasetNameOption = Annotated[
    str | None,
    typer.Option("--dataset-name", metavar="NAME", help="Name of the data set in the store, if not its own."),
]
TechniquesOption = Annotated[
    str,
    typer.Option(
        "--techniques",
        metavar="T",
        help="A comma lists passes, + combines in one pass, : gives a variant: prompt,controlnet:canny+lora",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="M",
        help="A known model (see `featstore models`), a diffusers folder, or OWNER/NAME@REVISION of the Hugging Face "
        "Hub (the revision may be left out).",
    ),
]
TimestepsOption = Annotated[
    str, typer.Option("--timesteps", metavar="T,..", help="What the UNet is fed, 0..999, comma separated.")
]
LayersOption = Annotated[
    str | None,
    typer.Option(
        "--layers", metavar="PRESET,NAME..", help="Presets and layer names (see `featstore models M --layers`)."
    ),
]
DataRootOption = Annotated[
    Path | None,
    typer.Option("--data-root", envvar="FEATSTORE_DATA", metavar="DIR", help="Where data sets lie; default ./data."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1..; default: a GPU where there is one."),
]
WorkersOption = Annotated[
    int,
    typer.Option(
        "--workers", metavar="N", help="Processes of this machine, one for each GPU; default: this process alone."
    ),
]
SchedulerOption = Annotated[
    str | None,
    typer.Option("--scheduler", metavar="ADDRESS", help="A Dask cluster, e.g. tcp://10.0.0.1:8786 (docs/cluster.md)."),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        envvar="FEATSTORE_CACHE",
        metavar="DIR",
        help="Keep what is read of a remote store in this folder and read it there the next time.",
        show_default=False,
    ),
]
CacheBytesOption = Annotated[
    str, typer.Option("--cache-bytes", metavar="SIZE", help="Bytes that the cache never exceeds, e.g. 20GB.")
]

ImageSizeOption = Annotated[
    str | None,
    typer.Option("--image-size", metavar="PX", help="Side of the model's input, or HEIGHTxWIDTH, e.g. 512x768."),
]

PromptOption = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="Replaces the data set's fixed detailed text.")
]
CaptionsOption = Annotated[
    Path | None,
    typer.Option("--captions", metavar="FILE", help="File of texts an image, for `prompt:caption`."),
]
ControlnetScaleOption = Annotated[
    float, typer.Option("--controlnet-scale", metavar="X", help="Factor on what ControlNets add.")
]
LoraScaleOption = Annotated[float, typer.Option("--lora-scale", metavar="X", help="Factor on what LoRAs add.")]
IpAdapterScaleOption = Annotated[
    float, typer.Option("--ip-adapter-scale", metavar="X", help="Factor on what IP-Adapters add.")
]
GuidanceScaleOption = Annotated[
    float, typer.Option("--guidance-scale", metavar="X", help="Scale of classifier-free guidance, for `cfg`.")
]
AllowPickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Read weights from pickles too, which can run code.")
]
QuickSplitsOption = Annotated[
    int | None, typer.Option("--splits", metavar="N", min=1, help="Splits of every head, for quick looks.")
]
QuickEnsembleOption = Annotated[
    int | None, typer.Option("--ensemble", metavar="N", min=1, help="Members of every head, for quick looks.")
]
QuickMaxStepsOption = Annotated[
    int | None, typer.Option("--max-steps", metavar="N", min=1, help="Steps at most, for quick looks.")
]
QuickLimitOption = Annotated[
    int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N images, for quick looks.")
]

DEFAULT_STORE = "features.zarr"
DEFAULT_CACHE_BYTES = "50GB"
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(?:([kmgt])(i?))?b?", re.IGNORECASE)


def parse_timesteps(text: str) -> tuple[int, ...]:
    """``50,200`` as integers.

    Raises:
        BadRequestError: if a part is no integer.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadRequestError(
            f"timesteps {text!r} are not integers separated by commas", hint="as in --timesteps 50,200"
        ) from None


def parse_bytes(text: str) -> int:
    """``20GB`` as a number of bytes; units are decimal, or binary as in ``20GiB``.

    Raises:
        BadRequestError: if it is no positive size.
    """
    match = _BYTES.fullmatch(text.strip())
    power = "kmgt".index(match[2].lower()) + 1 if match and match[2] else 0
    size_bytes = int(Fraction(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if size_bytes < 1:
        raise BadRequestError(f"{text!r} is no size in bytes", hint="as in --cache-bytes 20GB, 512MiB or 1000000")
    return size_bytes


def parse_image_size(text: str | None) -> int | tuple[int, int] | None:
    """``512`` as a side, ``512x768`` as (height, width).

    Raises:
        BadRequestError: if it is neither.
    """
    if text is None:
        return None
    try:
        sides = [int(part) for part in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise BadRequestError(
            f"image size {text!r} is neither a side nor HEIGHTxWIDTH", hint="as in --image-size 512 or 512x768"
        )
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])

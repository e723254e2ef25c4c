"""Options that say which runs of a store are meant, and what they mean."""

from __future__ import annotations

from typing import Annotated

import typer

import featstore.models
import featstore.techniques
from featstore.cli.options import parse_timesteps
from featstore.errors import BadRequestError
from featstore.store.meaning import Query

TechniquesFilter = Annotated[
    str | None,
    typer.Option("--techniques", "--technique", metavar="T,..", help="Only runs of these techniques."),
]
ModelFilter = Annotated[str | None, typer.Option("--model", metavar="M", help="Only runs of this model.")]
TimestepsFilter = Annotated[
    str | None, typer.Option("--timesteps", "--timestep", metavar="T,..", help="Only runs at these timesteps.")
]
LayersFilter = Annotated[
    str | None, typer.Option("--layers", metavar="NAME,..", help="Only runs that have these layers.")
]
RunFilter = Annotated[
    list[str] | None,
    typer.Option("--run", metavar="FINGERPRINT", help="Only the run whose fingerprint begins so; may be repeated."),
]
WhereFilter = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="NAME=VALUE",
        help="Only runs whose recipe has this value, e.g. seed=3 or prompt='a horse'; may be repeated.",
    ),
]
RunOption = Annotated[
    list[str] | None,
    typer.Option(
        "--run",
        metavar="FINGERPRINT",
        help="Where several runs fit: the one whose fingerprint begins so (`featstore info` prints them); may be "
        "repeated.",
    ),
]


def query(
    techniques: str | None = None,
    model: str | None = None,
    timesteps: str | None = None,
    layers: str | None = None,
    runs: list[str] | None = None,
    where: list[str] | None = None,
) -> Query:
    """What the options of this module ask for.

    Raises:
        BadRequestError: for what cannot be parsed; names are checked against a store by `Query.select`.
    """
    return Query(
        techniques=() if techniques is None else expressions(techniques),
        models=() if model is None else (featstore.models.public_name(model),),
        timesteps=() if timesteps is None else parse_timesteps(timesteps),
        layers=() if layers is None else tuple(name.strip() for name in layers.split(",")),
        fingerprints=tuple(runs or ()),
        fields=dict(map(_field, where or ())),
    )


def expressions(text: str) -> tuple[str, ...]:
    """The passes that ``text`` lists, as runs are named after them.

    Raises:
        BadRequestError: for an unknown technique, or what cannot be parsed.
    """
    return tuple(technique.expression for technique in featstore.techniques.parse(text))


def _field(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise BadRequestError(f"--where {text!r} is not NAME=VALUE", hint="as in --where seed=3")
    return name, value

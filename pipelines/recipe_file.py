"""Experiments as files: what to extract, which heads to train on it, and what the paper reports for them.

A TOML file::

    title = "Horse-21: parts of horses from 30 labelled images"
    source = "Meng et al., NeurIPS 2024, arXiv 2410.06719"
    dataset = "horse21"
    model = "sd15"

    [extract.maps]
    techniques = "basic,prompt,controlnet,lora"
    timesteps = [51]

    [head.GATE]
    from = "maps"
    task = "segmentation"
    reported = { miou = 0.672 }

Keys are those of `Extraction` and `HeadTraining`; an unknown one is refused with the nearest.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from featstore.errors import BadRequestError, unknown_name
from featstore.pipelines.tasks import TASKS

T = TypeVar("T")

_SUFFIX = ".toml"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """One ``[extract.NAME]``: the options of ``featstore extract`` that it is run with."""

    techniques: str
    timesteps: tuple[int, ...] = (50,)
    layers: str | None = None
    model: str | None = None
    image_size: int | None = None
    prompt: str | None = None
    prompt_chunks: int = 1
    controlnet_scale: float = 1.0
    lora_scale: float = 1.0
    ip_adapter_scale: float = 1.0
    guidance_scale: float = 7.5
    denoise_from: int | None = None
    noise_ensemble: int = 1
    precision: str = "float16"
    reduce: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Concatenated:
    """One of a head's ``beside``: layers that are concatenated after the amalgamation."""

    source: str
    """``from``: the extraction that they come from."""
    layers: str | None = None
    """None: all aggregated attention layers."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeadTraining:
    """One ``[head.NAME]``: what ``featstore train-head`` is run with."""

    source: str
    """``from``: the extraction whose runs are amalgamated."""
    techniques: str | None = None
    """Those of its passes that are; None: all."""
    timesteps: tuple[int, ...] | None = None
    """Those of its timesteps that are; None: all."""
    layers: str | None = None
    beside: tuple[Concatenated, ...] | None = None
    """None: the attention layers of the most steered run, where there are any."""
    task: str = "segmentation"
    head: str | None = None
    assigners: int = 3
    per_channel: bool = False
    ensemble: int = 10
    splits: int = 5
    max_steps: int | None = None
    reported: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the source reports, 0..1, by the names of the task's metrics."""
    note: str = ""
    """In what the source's experiment differs from this one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFile:
    """An experiment."""

    name: str
    title: str
    source: str
    dataset: str
    model: str | None = None
    extract: Mapping[str, Extraction]
    head: Mapping[str, HeadTraining]


def names() -> list[str]:
    """The experiments that come with featstore."""
    folder = importlib.resources.files("featstore.pipelines") / "recipes"
    return sorted(path.name.removesuffix(_SUFFIX) for path in folder.iterdir() if path.name.endswith(_SUFFIX))


def load(name: str) -> RecipeFile:
    """One of `names`, or a file of one's own.

    Raises:
        BadRequestError: for an unknown name, and whatever is wrong in a file, with the place.
    """
    return parse(*named_text(name, "recipes", names()))


def named_text(name: str, folder: str, known: Sequence[str]) -> tuple[str, str]:
    """Name and text of a TOML file that comes along, or of one's own.

    Args:
        name: one of ``known``, or the path of a file.
        folder: where those that come along lie, in this package.
        known: their names.

    Raises:
        BadRequestError: for an unknown name, or a file that cannot be read.
    """
    if name in known:
        place = importlib.resources.files("featstore.pipelines") / folder / f"{name}{_SUFFIX}"
        return name, place.read_text("utf-8")
    path = Path(name)
    if path.suffix != _SUFFIX:
        raise unknown_name("experiment", name, known)
    try:
        return path.stem, path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequestError(f"cannot read {name}: {error}", hint=f"known by name: {', '.join(known)}") from error


def parse(name: str, text: str) -> RecipeFile:
    """The experiment that ``text`` describes; see the module.

    Raises:
        BadRequestError: naming what is wrong and where.
    """
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadRequestError(f"{name}: no TOML: {error}") from error
    for table in ("extract", "head"):
        found = value.get(table)
        if not isinstance(found, dict) or not found:
            raise BadRequestError(f"{name}: no [{table}.NAME]", hint="an experiment extracts, and trains heads")
    extract = {key: build(Extraction, one, f"{name}: [extract.{key}]") for key, one in value["extract"].items()}
    head = {key: _head(one, f"{name}: [head.{key}]", extract) for key, one in value["head"].items()}
    whole = build(RecipeFile, {**value, "name": name, "extract": extract, "head": head}, name)
    return whole


def _head(value: Any, where: str, extract: Mapping[str, Extraction]) -> HeadTraining:
    if not isinstance(value, dict):
        raise BadRequestError(f"{where} is no table")
    value = dict(value)
    if "source" in value:
        raise BadRequestError(f"{where}: unknown key 'source'", hint="write from = ...")
    value["source"] = value.pop("from", next(iter(extract)))
    if "beside" in value:
        parts = []
        for number, one in enumerate(value["beside"]):
            renamed = {"source" if key == "from" else key: item for key, item in dict(one).items()}
            parts.append(build(Concatenated, renamed, f"{where}: beside {number + 1}"))
        value["beside"] = tuple(parts)
    head = build(HeadTraining, value, where)
    for source in (head.source, *(one.source for one in head.beside or ())):
        if source not in extract:
            raise BadRequestError(f"{where}: {unknown_name('extraction', source, extract)}")
    kind = TASKS[head.task]
    if head.head is not None and head.head not in kind.heads:
        raise BadRequestError(f"{where}: {unknown_name('head', head.head, kind.heads)}")
    for metric in head.reported:
        if metric not in kind.metrics:
            raise BadRequestError(f"{where}: reported: {unknown_name('metric', metric, kind.metrics)}")
    return head


def build(cls: type[T], value: Any, where: str) -> T:
    """A dataclass from a table, its keys and types checked."""
    if not isinstance(value, dict):
        raise BadRequestError(f"{where} is no table")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in value:
        if key not in fields:
            raise BadRequestError(f"{where}: {unknown_name('key', key, fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise BadRequestError(f"{where} lacks {', '.join(missing)}")
    return cls(**{key: _typed(hints[key], one, f"{where}: {key}") for key, one in value.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint``; lists become tuples, whole numbers numbers."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is tuple and isinstance(value, list | tuple):
            inner = typing.get_args(option)[0]
            return tuple(_typed(inner, one, where) for one in value)
        if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(origin, type) and isinstance(value, origin) and (origin is bool or not isinstance(value, bool)):
            return value
    raise BadRequestError(f"{where}: {value!r} is not of type {hint}")

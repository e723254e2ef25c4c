"""What an experiment asks, as a TOML file: many settings written in few lines, and what is compared with what.

A file::

    title = "Does a prompt help, and when?"
    dataset = "toyhorse"

    [extract]
    layers = "up-level2-upsampler-out"

    [head]
    ensemble = 3
    splits = 6

    [axes]
    extract.techniques = ["basic", "prompt:low", "prompt:high"]
    extract.timesteps = [51, 501]
    head.max_steps = { "1x" = 2000, "2x" = 4000 }

    [[compare]]
    along = "techniques"
    to = "basic"

Keys below ``[extract]`` and ``[head]`` are those of `featstore.pipelines.recipe_file`, and hold for all settings. The
settings are the product of the axes, or a list of ``[[setting]]`` with an ``extract`` and a ``head`` of their own, or
each of that list with each of the product. An axis is called by the last part of its key; ``dataset`` and ``seed`` can
be axes too.
"""

from __future__ import annotations

import importlib.resources
import itertools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from featstore.errors import BadRequestError, unknown_name
from featstore.pipelines.experiment.settings import SETTING, Comparison, Correlation, ExperimentFile, Setting
from featstore.pipelines.recipe_file import Extraction, HeadTraining, build, named_text
from featstore.pipelines.tasks import TASKS

_SUFFIX = ".toml"
_WHOLE = ("dataset", "seed")
_TABLES = ("extract", "head")
# What a head of `reproduce` says of where its features come from; here a setting's own ``extract`` says it.
_NOT_HERE = ("from", "source", "beside", "techniques", "timesteps", "reported", "note")
_PLAIN = ("techniques", "dataset", SETTING)


def names() -> list[str]:
    """The experiments that come with featstore."""
    folder = importlib.resources.files("featstore.pipelines") / "experiments"
    return sorted(path.name.removesuffix(_SUFFIX) for path in folder.iterdir() if path.name.endswith(_SUFFIX))


def load(name: str) -> ExperimentFile:
    """One of `names`, or a file of one's own.

    Raises:
        BadRequestError: for an unknown name, and whatever is wrong in a file, with the place.
    """
    return parse(*named_text(name, "experiments", names()))


def parse(name: str, text: str) -> ExperimentFile:
    """The experiment that ``text`` describes; see the module.

    Raises:
        BadRequestError: naming what is wrong and where.
    """
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadRequestError(f"{name}: no TOML: {error}") from error
    common = {key: value.pop(key) for key in (*_WHOLE, *_TABLES) if key in value}
    axes = _axes(value.pop("axes", {}), f"{name}: [axes]")
    listed = value.pop(SETTING, [])
    if not axes and not listed:
        raise BadRequestError(f"{name}: no [axes] and no [[setting]]", hint="an experiment compares settings")
    settings = tuple(_settings(name, common, axes, listed))
    along = (SETTING, *axes) if listed else tuple(axes)
    if (twice := _first_twice([one.name for one in settings])) is not None:
        raise BadRequestError(f"{name}: two settings are called {twice!r}", hint="give each a name of its own")
    compare = tuple(
        build(Comparison, one, f"{name}: compare {number}")
        for number, one in enumerate(_list(value.pop("compare", []), f"{name}: compare"), 1)
    )
    correlate = value.pop("correlate", None)
    whole = build(
        ExperimentFile,
        {
            **value,
            "name": name,
            "axes": along,
            "settings": settings,
            "compare": compare,
            **({} if correlate is None else {"correlate": build(Correlation, correlate, f"{name}: [correlate]")}),
        },
        name,
    )
    _check(whole)
    return whole


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise BadRequestError(f"{where} is no list of tables")
    return value


def _first_twice(values: Sequence[str]) -> str | None:
    return next((one for index, one in enumerate(values) if one in values[:index]), None)


Axis = tuple[tuple[str, ...], Mapping[str, Any]]
"""Keys that lead to what an axis changes, and its values by what they are called."""


def _axes(value: Any, where: str) -> dict[str, Axis]:
    if not isinstance(value, dict):
        raise BadRequestError(f"{where} is no table")
    found: dict[str, Axis] = {}
    for table, inner in value.items():
        if table not in (*_WHOLE, *_TABLES):
            raise BadRequestError(f"{where}: {unknown_name('key', table, (*_WHOLE, *_TABLES))}")
        entries = {(table,): inner} if table in _WHOLE else {(table, key): one for key, one in _table(inner, where)}
        for keys, values in entries.items():
            if keys[-1] in found:
                raise BadRequestError(f"{where}: two axes are called {keys[-1]!r}")
            found[keys[-1]] = (keys, _values(values, f"{where} {'.'.join(keys)}"))
    return found


def _table(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise BadRequestError(f"{where}: write extract.KEY = [...] or head.KEY = [...]")
    yield from value.items()


def _values(values: Any, where: str) -> Mapping[str, Any]:
    if isinstance(values, list):
        labels = [",".join(map(str, one)) if isinstance(one, list) else str(one) for one in values]
        if (twice := _first_twice(labels)) is not None:
            raise BadRequestError(f"{where}: {twice} is listed twice")
        values = dict(zip(labels, values, strict=True))
    if not isinstance(values, dict) or not values:
        raise BadRequestError(f"{where} is neither a list of values nor a table of values by name")
    return values


def _settings(name: str, common: Mapping[str, Any], axes: Mapping[str, Axis], listed: Any) -> Iterator[Setting]:
    own: list[tuple[str | None, Mapping[str, Any]]] = [(None, {})]
    if listed:
        own = []
        for number, one in enumerate(_list(listed, f"{name}: setting"), 1):
            where = f"{name}: setting {number}"
            if not isinstance(one, dict) or not isinstance(one.get("name"), str):
                raise BadRequestError(f"{where} has no name")
            for key in one:
                if key not in ("name", *_WHOLE, *_TABLES):
                    raise BadRequestError(f"{where}: {unknown_name('key', key, ('name', *_WHOLE, *_TABLES))}")
            own.append((one["name"], one))
    for title, table in own:
        for chosen in itertools.product(*(values.items() for _, values in axes.values())):
            yield _setting(name, title, (common, table), axes, chosen)


def _setting(
    name: str,
    title: str | None,
    tables: Sequence[Mapping[str, Any]],
    axes: Mapping[str, Axis],
    chosen: Sequence[tuple[str, Any]],
) -> Setting:
    """One place in the product; later tables go before earlier ones, axes before both."""
    places = {axis: label for axis, (label, _) in zip(axes, chosen, strict=True)}
    called = ", ".join([*([title] if title else []), *(_called(axis, label) for axis, label in places.items())])
    where = f"{name}: setting {called!r}"
    value: dict[str, Any] = {"extract": {}, "head": {}}
    for table in tables:
        for key, one in table.items():
            if key in _TABLES:
                value[key].update(dict(_table(one, where)))
            else:
                value[key] = one
    for (keys, _), (_, one) in zip(axes.values(), chosen, strict=True):
        if len(keys) == 1:
            value[keys[0]] = one
        else:
            value[keys[0]][keys[1]] = one
    for key in value["head"]:
        if key in _NOT_HERE:
            raise BadRequestError(f"{where}: unknown key 'head.{key}'", hint="extract.KEY says what a setting reads")
    dataset, seed = value.get("dataset"), value.get("seed")
    if not isinstance(dataset, str):
        raise BadRequestError(f"{where} has no dataset", hint='write dataset = "toyhorse" at the top of the file')
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise BadRequestError(f"{where}: seed {seed!r} is no whole number from 0 on")
    if isinstance(value["extract"].get("timesteps"), int):
        value["extract"]["timesteps"] = [value["extract"]["timesteps"]]
    head = build(HeadTraining, {**value["head"], "source": called}, f"{where}: head")
    kind = TASKS[head.task]
    if head.head is not None and head.head not in kind.heads:
        raise BadRequestError(f"{where}: {unknown_name('head', head.head, kind.heads)}")
    return Setting(
        name=called,
        axes={**({SETTING: title} if title else {}), **places},
        dataset=dataset,
        seed=seed,
        extract=build(Extraction, value["extract"], f"{where}: extract"),
        head=head,
    )


def _called(axis: str, label: str) -> str:
    """How a place on an axis is written in a setting's name."""
    if axis in _PLAIN:
        return label
    if axis == "timesteps":
        return "t" + label.replace(",", "+")
    return f"{axis.replace('_', ' ')} {label}"


def _check(whole: ExperimentFile) -> None:
    """Refuse comparisons with what is not there."""
    known = [one.name for one in whole.settings]
    metrics = {metric for one in whole.settings for metric in TASKS[one.head.task].metrics}
    for number, one in enumerate(whole.compare, 1):
        where = f"{whole.name}: compare {number}"
        if (one.along is None) is (one.a is None) or (one.to is None) is (one.b is None):
            raise BadRequestError(f"{where} says neither along and to, nor a and b")
        for name in (one.a, one.b):
            if name is not None and name not in known:
                raise BadRequestError(f"{where}: {unknown_name('setting', name, known)}")
        if one.along is not None:
            _check_place(whole, one.along, one.to or "", where)
        _check_metric(one.metric, metrics, where)
    if whole.correlate is not None:
        where = f"{whole.name}: [correlate]"
        _check_place(whole, "techniques", whole.correlate.to, where)
        _check_metric(whole.correlate.metric, metrics, where)
        for setting in whole.settings:
            if "," in setting.extract.techniques or len(setting.extract.timesteps) != 1:
                raise BadRequestError(f"{where}: setting {setting.name!r} has several runs; a score is of one")


def _check_place(whole: ExperimentFile, along: str, to: str, where: str) -> None:
    if along not in whole.axes:
        raise BadRequestError(f"{where}: {unknown_name('axis', along, whole.axes)}")
    there = dict.fromkeys(one.axes[along] for one in whole.settings)
    if to not in there:
        raise BadRequestError(f"{where}: {unknown_name(f'place on axis {along!r}', to, there)}")


def _check_metric(metric: str | None, known: set[str], where: str) -> None:
    if metric is not None and metric not in known:
        raise BadRequestError(f"{where}: {unknown_name('metric', metric, known)}")

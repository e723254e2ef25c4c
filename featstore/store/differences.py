"""In what runs differ, said in the words of their recipes and not by a hash alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featstore.recipe import Recipe, canonical_json

if TYPE_CHECKING:
    from featstore.store.run import Run

_PARAMETERS = "parameters"
_MAX_CHARS = 60
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHOWN_DIGITS = 12


def leaves(recipe: Recipe) -> dict[str, Any]:
    """Every single value that a recipe is made of, by name.

    What the technique resolved to stands beside the other fields, and what lies deeper has dots in its
    name: ``seed``, ``prompt``, ``controlnets.0.scale``.
    """
    value = recipe.to_json()
    parameters = value.pop(_PARAMETERS)
    flat = dict(_flat("", parameters))
    own = dict(_flat("", value))
    return {(f"{_PARAMETERS}.{name}" if name in own else name): leaf for name, leaf in flat.items()} | own


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    items: Iterator[tuple[object, Any]]
    if isinstance(value, Mapping) and (value or not prefix):
        items = iter(value.items())
    elif isinstance(value, list | tuple) and value:
        items = iter(enumerate(value))
    else:
        yield prefix.removesuffix("."), value
        return
    for name, inner in items:
        yield from _flat(f"{prefix}{name}.", inner)


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For each of ``runs`` the `leaves` of its recipe in which not all of them agree; None where it has no such one."""
    every = [leaves(run.recipe) for run in runs]
    names = dict.fromkeys(name for one in every for name in one)
    odd = [name for name in names if len({canonical_json(one.get(name)) for one in every}) > 1]
    return [{name: one.get(name) for name in odd} for one in every]


def told_apart(runs: Sequence[Run]) -> str:
    """One line: each run's fingerprint with that in which it differs from the others."""
    pairs = zip(runs, differences(runs), strict=True)
    return "; ".join(f"{run.fingerprint[:12]} ({in_words(odd)})" for run, odd in pairs)


def in_words(values: Mapping[str, Any]) -> str:
    """``seed=3, prompt=a horse``; long values are cut."""
    return ", ".join(f"{name}={short(value)}" for name, value in values.items())


def short(value: object) -> str:
    """A value of a recipe for people: 60 characters at most, of a digest the first 12 digits."""
    text = value if isinstance(value, str) else canonical_json(value).decode()
    if _DIGEST.fullmatch(text):
        return text[:_SHOWN_DIGITS]
    return text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 3] + "..."

"""Runs found by what they mean: model, technique, timestep, layers, or any value of their recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from featstore.errors import unknown_name
from featstore.store.differences import leaves, short
from featstore.store.run import Run


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What runs are asked for; what is left empty excludes none."""

    techniques: tuple[str, ...] = ()
    """Any of these expressions, as they were typed when extracting."""
    models: tuple[str, ...] = ()
    """Any of these models, by public name."""
    timesteps: tuple[int, ...] = ()
    """Any of these timesteps."""
    layers: tuple[str, ...] = ()
    """Every one of these layers."""
    fingerprints: tuple[str, ...] = ()
    """Any of these first digits of a fingerprint."""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Value by name in `leaves`, e.g. ``seed`` or ``prompt``; a string also stands for the number that it spells."""

    def __bool__(self) -> bool:
        """Whether anything is asked."""
        return any(getattr(self, field.name) for field in dataclasses.fields(self))

    def select(self, runs: Sequence[Run]) -> list[Run]:
        """Those of ``runs`` that fit, in their order.

        Raises:
            BadRequestError: for a name or value that none of ``runs`` has: the message lists those that
                they have. (Values that only never meet in one run give an empty list.)
        """
        if runs:
            self._check(runs)
        return [run for run in runs if self.fits(run)]

    def fits(self, run: Run) -> bool:
        """Whether ``run`` is one of those asked for."""
        recipe = run.recipe
        return (
            recipe.technique in (self.techniques or (recipe.technique,))
            and recipe.model in (self.models or (recipe.model,))
            and recipe.timestep in (self.timesteps or (recipe.timestep,))
            and all(layer in run.layers for layer in self.layers)
            and (not self.fingerprints or run.fingerprint.startswith(self.fingerprints))
            and self._fields_fit(run)
        )

    def _fields_fit(self, run: Run) -> bool:
        if not self.fields:
            return True
        have = leaves(run.recipe)
        return all(name in have and _equal(have[name], value) for name, value in self.fields.items())

    def _check(self, runs: Sequence[Run]) -> None:
        """Raise for the first name or value that none of ``runs`` has."""
        recipes = [run.recipe for run in runs]
        known: tuple[tuple[str, Iterable[object], Iterable[object]], ...] = (
            ("technique", self.techniques, (recipe.technique for recipe in recipes)),
            ("model", self.models, (recipe.model for recipe in recipes)),
            ("timestep", self.timesteps, (recipe.timestep for recipe in recipes)),
            ("layer", self.layers, (layer for run in runs for layer in run.layers)),
        )
        for kind, asked, there in known:
            if asked:
                _require(kind, asked, there)
        for prefix in self.fingerprints:
            if not any(run.fingerprint.startswith(prefix) for run in runs):
                raise unknown_name("fingerprint", prefix, {run.fingerprint[:12] for run in runs})
        if self.fields:
            every = [leaves(recipe) for recipe in recipes]
            for name, value in self.fields.items():
                _require("field of a recipe", [name], (known_name for one in every for known_name in one))
                values = [one[name] for one in every if name in one]
                if not any(_equal(have, value) for have in values):
                    raise unknown_name(name, short(value), {short(have) for have in values})


def _require(kind: str, asked: Iterable[object], there: Iterable[object]) -> None:
    names = {str(name) for name in there}
    for name in asked:
        if str(name) not in names:
            raise unknown_name(kind, str(name), names)


def _equal(have: object, asked: object) -> bool:
    if have == asked:
        return True
    if isinstance(asked, str):
        with contextlib.suppress(ValueError):
            return bool(have == json.loads(asked))
    return False

"""Extractions that make, of other images, features as those of given recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from featstore.errors import IncompatibleError
from featstore.pipelines.plan import ExtractConfig, Plan
from featstore.recipe import Recipe
from featstore.store.differences import in_words, leaves
from featstore.techniques import SteeringOptions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Layers of one recipe that are needed."""

    recipe: Recipe
    model: str
    """Name or folder of the model."""
    layers: tuple[str, ...]


def extractions(needs: Iterable[Need], base: ExtractConfig) -> list[tuple[ExtractConfig, list[Recipe]]]:
    """As few extractions as give all of ``needs``, each with the recipes that its runs should have.

    Args:
        needs: what is needed; layers of one recipe may come in several.
        base: images, store and device.
    """
    merged: dict[str, Need] = {}
    for need in needs:
        known = merged.get(need.recipe.fingerprint)
        layers = need.layers if known is None else tuple(dict.fromkeys([*known.layers, *need.layers]))
        merged[need.recipe.fingerprint] = dataclasses.replace(need, layers=layers)
    groups: list[tuple[ExtractConfig, list[Recipe]]] = []
    for need in merged.values():
        config = _config(need, base)
        # Configurations hold a data set's facts, which cannot be hashed; there are a handful of them.
        same = next((recipes for known, recipes in groups if known == config), None)
        if same is None:
            groups.append((config, [need.recipe]))
        else:
            same.append(need.recipe)
    return [
        (dataclasses.replace(config, techniques=",".join(recipe.technique for recipe in recipes)), recipes)
        for config, recipes in groups
    ]


def _config(need: Need, base: ExtractConfig) -> ExtractConfig:
    """The extraction of one recipe, without its technique."""
    recipe, info = need.recipe, base.like
    prompt = recipe.parameters.get("prompt") if "prompt" in recipe.technique.split("+") else None
    guidance = recipe.parameters.get("guidance")
    return dataclasses.replace(
        base,
        techniques="",
        model=need.model,
        layers=",".join(need.layers),
        timesteps=(recipe.timestep,),
        denoise_from=recipe.denoise_from,
        noise_ensemble=recipe.noise_ensemble,
        image_size_px=(recipe.height_px, recipe.width_px),
        precision=recipe.precision,
        reduce=f"pca:{recipe.components}" if recipe.components else None,
        seed=recipe.seed,
        steering=SteeringOptions(
            prompt=prompt if info is None or prompt != info.prompt else None,
            prompt_chunks=recipe.parameters.get("prompt_chunks", 1),
            **({} if guidance is None else {"guidance_scale": guidance}),
        ),
    )


def check(plan: Plan, recipes: Sequence[Recipe]) -> None:
    """Refuse a plan whose recipes are not ``recipes``.

    Raises:
        IncompatibleError: saying in what they differ.
    """
    for run, wanted in zip(plan.runs, recipes, strict=True):
        if run.recipe.fingerprint != wanted.fingerprint:
            raise IncompatibleError(
                f"features of {wanted.technique!r} would be made otherwise than those that the head was trained on: "
                f"{_difference(run.recipe, wanted)}",
                hint="use the model, data and kind of device that its features were extracted with",
            )


def _difference(now: Recipe, then: Recipe) -> str:
    ours, theirs = leaves(now), leaves(then)
    odd = [name for name in dict.fromkeys([*ours, *theirs]) if ours.get(name) != theirs.get(name)]

    def said(values: dict[str, Any]) -> str:
        return in_words({name: values.get(name) for name in odd})

    return f"{said(ours)} instead of {said(theirs)}"

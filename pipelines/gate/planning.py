"""What a gate would do, found out before any weight is loaded: images, passes, layers. Everything wrong is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

import featstore.techniques
from featstore.content_shift import LEAST_SIDE, telling_layers
from featstore.datasets import Sample
from featstore.errors import BadRequestError
from featstore.pipelines.gate.config import MIN_IMAGES, GateConfig
from featstore.pipelines.plan import ExtractConfig, Plan, PlannedRun, make_plan
from featstore.store import precision as precisions
from featstore.techniques import Part, Technique

_NO_STORE = "memory://gate"
_ATTENTION_PREFIX = "attn-"
"""Height and width of a map at least: a Laplacian has no inner position below."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GatePlan:
    """Everything that a gate would do."""

    config: GateConfig
    extract: Plan
    """The extraction that the same options would ask for, of every pass that is judged or compared with."""
    samples: tuple[Sample, ...]
    """The images, in the data set's order."""
    techniques: tuple[str, ...]
    """Expressions of what is judged, ``basic`` first."""
    anchor: tuple[str, int]
    """Expression and timestep of the anchor."""
    layers: tuple[str, ...]
    """What is judged."""

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        recipe = self.extract.runs[0].recipe
        return recipe.height_px, recipe.width_px

    @property
    def runs(self) -> Mapping[str, PlannedRun]:
        """A planned run of each technique, for what does not depend on the timestep."""
        return {run.recipe.technique: run for run in self.extract.runs}

    @property
    def bytes_per_image(self) -> Mapping[str, int]:
        """What `featstore extract` would store of one image at one timestep, in float16, by technique."""
        stored = precisions.of("float16").stored
        return {
            name: sum(precisions.image_bytes(shape, stored) for shape in run.layers.values())
            for name, run in self.runs.items()
        }


def make_gate_plan(config: GateConfig) -> GatePlan:
    """Find out what ``config`` asks for.

    Raises:
        BadRequestError: for anything the user named that does not exist or cannot be.
        NotFoundError: if data or weights are absent; the hint says where they belong.
    """
    asked = featstore.techniques.parse(config.techniques)
    anchor, anchor_timestep = config.anchor_parts
    (basic,) = featstore.techniques.parse("basic")
    judged = _union(basic, *asked)
    everything = _union(*judged, anchor)
    extract = make_plan(
        ExtractConfig(
            dataset=config.dataset,
            techniques=",".join(one.expression for one in everything),
            store=_NO_STORE,  # nothing is read or written there: passes are judged in memory
            model=config.model,
            timesteps=tuple(dict.fromkeys((*config.timesteps, anchor_timestep, 0))),
            layers=config.layers,
            image_size_px=config.image_size_px,
            split=config.split,
            device=config.device,
            steering=config.steering,
            seed=config.seed,
            data_root=config.data_root,
            dataset_name=config.dataset_name,
        )
    )
    if len(extract.wanted) < MIN_IMAGES:
        raise BadRequestError(
            f"data set {extract.dataset_name!r} has {len(extract.wanted)} images to judge by; a gate needs "
            f"{MIN_IMAGES} or more"
        )
    same = {frozenset(one.parts): one.expression for one in everything}
    return GatePlan(
        config=config,
        extract=extract,
        samples=tuple(extract.dataset.samples[index] for index in _spaced(extract.wanted, config.limit)),
        techniques=tuple(one.expression for one in judged),
        anchor=(same[frozenset(anchor.parts)], anchor_timestep),
        layers=_layers(extract.runs[0].layers, asked=config.layers),
    )


def _union(*techniques: Technique) -> list[Technique]:
    """Each pass once, in order."""
    found: dict[frozenset[Part], Technique] = {}
    for one in techniques:
        found.setdefault(frozenset(one.parts), one)
    return list(found.values())


def _spaced(wanted: tuple[int, ...], count: int) -> list[int]:
    """``count`` of the images at equal distances, for the first ones of a sorted data set are all of a kind."""
    places = np.linspace(0, len(wanted) - 1, min(count, len(wanted))).round().astype(int)
    return [wanted[place] for place in places]


def _layers(shapes: Mapping[str, tuple[int, int, int]], *, asked: str | None) -> tuple[str, ...]:
    if asked is None:
        kept = {name: shape for name, shape in shapes.items() if not name.startswith(_ATTENTION_PREFIX)}
        chosen = telling_layers(kept)
        if not chosen:
            raise BadRequestError("none of the model's default layers can be judged", hint="name some: --layers full")
        return tuple(chosen)
    for name, (_, height, width) in shapes.items():
        if min(height, width) < LEAST_SIDE:
            raise BadRequestError(
                f"layer {name!r} has maps of {height} x {width}, and a Laplacian needs {LEAST_SIDE} x {LEAST_SIDE}",
                hint="a larger --image-size makes them larger, or leave it out of --layers",
            )
    return tuple(shapes)

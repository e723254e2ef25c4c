"""Merged checkpoints: a whole Stable Diffusion in one file, with a LoRA or a fine-tuning folded into it. No torch.

The seed code's LoRAs are such files. Of one that fits a model every parameter stands in for the model's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from featstore.errors import BadRequestError
from featstore.models.headers import Shapes, kernel_free, some, written
from featstore.models.ldm_names import Stored, text_stored, unet_names

OTHER_MODEL_HINT = "a LoRA works on the architecture that it was trained for only"
_UNET = "model.diffusion_model."
_TEXTS = (
    ("text_encoder", "cond_stage_model.transformer.", False),
    ("text_encoder", "cond_stage_model.model.", True),
    ("text_encoder", "conditioner.embedders.0.transformer.", False),
    ("text_encoder_2", "conditioner.embedders.1.model.", True),
)
"""Text encoders in merged checkpoints: component, prefix, whether in OpenCLIP's names."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """A whole parameter that stands in for the model's."""

    component: str
    """Network of the parameter."""
    parameter: str
    """Its name there."""
    stored: Stored
    """Where the file has it."""


def is_merged(shapes: Shapes) -> bool:
    """Whether tensors of these names are a merged checkpoint."""
    return any(key.startswith(_UNET) for key in shapes)


def merged_layout(what: str, shapes: Shapes, targets: Mapping[str, Shapes]) -> tuple[Replacement, ...]:
    """What a merged checkpoint replaces: all of the UNet and of the text encoders that it has.

    Args:
        what: the file, for messages.
        shapes: of its tensors; those of an autoencoder, of averages and of schedules are left alone.
        targets: shapes of the model's parameters by component.

    Raises:
        BadRequestError: if it is of another architecture or lacks tensors.
    """
    if "unet" not in targets:
        raise BadRequestError(f"{what} is a merged checkpoint of a UNet, which this model does not have")
    parameters = targets["unet"]
    old = unet_names({name.rpartition(".")[0] for name in parameters})
    places = {}
    for name in parameters:
        module, _, kind = name.rpartition(".")
        places[name] = [Stored(key=f"{_UNET}{old[module]}.{kind}")] if module in old else []
    replaced = _replacements(what, "unet", places, shapes, parameters)
    used = {one.stored.key for one in replaced}
    more = [key for key in shapes if key.startswith(_UNET) and key not in used]
    if more:
        raise BadRequestError(
            f"{what} does not fit this model, which lacks {len(more)} of its UNet's tensors: {some(more)}",
            hint=OTHER_MODEL_HINT,
        )
    for component, prefix, open_clip in _TEXTS:
        if component in targets and any(key.startswith(prefix) for key in shapes):
            parameters = targets[component]
            places = {
                name: text_stored(name.removeprefix("text_model."), prefix, open_clip=open_clip)
                for name in parameters
                if not name.endswith("position_ids")
            }
            replaced += _replacements(what, component, places, shapes, parameters)
    return tuple(replaced)


def _replacements(
    what: str, component: str, places: Mapping[str, list[Stored]], shapes: Shapes, parameters: Shapes
) -> list[Replacement]:
    replaced: list[Replacement] = []
    absent: list[str] = []
    for name, candidates in places.items():
        stored = next((one for one in candidates if one.key in shapes), None)
        if stored is None:
            absent.append(name)
            continue
        shape, target = shapes[stored.key], parameters[name]
        if stored.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        if stored.transposed:
            shape = shape[::-1]
        if kernel_free(shape) != kernel_free(target):
            raise BadRequestError(
                f"{what} does not fit this model: its {stored.key} is {written(shape)}, "
                f"the model's {name} {written(target)}",
                hint=OTHER_MODEL_HINT,
            )
        replaced.append(Replacement(component=component, parameter=name, stored=stored))
    if absent:
        raise BadRequestError(
            f"{what} does not fit this model: it lacks {len(absent)} of the {len(places)} tensors of its {component}: "
            f"{some(absent)}",
            hint=OTHER_MODEL_HINT,
        )
    return replaced

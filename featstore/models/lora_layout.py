"""What a LoRA file does to a model, worked out from names and shapes alone and checked whole. No torch.

Taken are LoRA and LoCon (LoRA of convolutions, plain or in Tucker form) as peft, diffusers, kohya's scripts and LyCORIS
write them, and merged checkpoints: a whole Stable Diffusion with everything trained into it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from featstore.errors import BadRequestError
from featstore.models.headers import Shape, Shapes, kernel_free, some, written
from featstore.models.lora_names import Names, Place, role
from featstore.models.merged_layout import OTHER_MODEL_HINT, Replacement, is_merged, merged_layout

_OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_": "OFT",
    "base_model.model.": "peft checkpoint, whose alpha is in another file",
}
_MERGE_HINT = "merge it into a checkpoint of the base model and give that: lora:MERGED.safetensors"
_TEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A product that is added to a weight: ``factor`` times up, mid and down."""

    component: str
    """Network of the weight."""
    parameter: str
    """Name of the weight in it."""
    down: str
    """Name of the tensor (r, in), or (r, in, kh, kw) of a convolution."""
    up: str
    """Name of the tensor (out, r), or (out, r, 1, 1)."""
    mid: str | None
    """Name of the tensor (r, r, kh, kw) of the Tucker form."""
    alpha: str | None
    """Name of the number alpha; the factor is alpha / r."""
    factor: float
    """The factor, if there is no ``alpha``."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All that a file does."""

    low_rank: tuple[LowRank, ...] = ()
    """Products that are added."""
    replaced: tuple[Replacement, ...] = ()
    """Parameters that are replaced."""


def layout(what: str, shapes: Shapes, metadata: Mapping[str, str], targets: Mapping[str, Shapes]) -> Layout:
    """What a file does to a model.

    Args:
        what: the file, for messages: "LoRA x.safetensors".
        shapes: of the file's tensors.
        metadata: the file's.
        targets: shapes of the model's parameters by component.

    Raises:
        BadRequestError: if the file is no LoRA or merged checkpoint, of a kind that is not taken, or does not fit the
            model with every one of its tensors.
    """
    if is_merged(shapes):
        return Layout(replaced=merged_layout(what, shapes, targets))
    for key in shapes:
        for mark, kind in _OTHER_KINDS.items():
            if mark in key:
                raise BadRequestError(
                    f"{what} is a {kind} ({key}); this version takes LoRA and LoCon", hint=_MERGE_HINT
                )
    modules: dict[Place, dict[str, str]] = {}
    odd: list[str] = []
    strangers: dict[str, None] = {}
    names = Names(targets)
    for key in shapes:
        found = role(key)
        if found is None:
            odd.append(key)
            continue
        place = names.place(found[0])
        if place is None:
            strangers[found[0]] = None
        elif modules.setdefault(place, {}).setdefault(found[1], key) != key:
            odd.append(key)
    if len(odd) == len(shapes):
        raise BadRequestError(
            f"{what} holds no LoRA: " + (f"no tensor is named so ({some(odd)})" if odd else "it has no tensors"),
            hint="a LoRA's tensors are named ..lora_A.weight, ..lora_down.weight or the like",
        )
    if odd:
        raise BadRequestError(f"{what}: {len(odd)} of its {len(shapes)} tensors mean nothing here: {some(odd)}")
    if strangers:
        raise BadRequestError(
            f"{what} does not fit this model, which lacks {len(strangers)} of its "
            f"{len(strangers) + len(modules)} modules: {some(list(strangers))}",
            hint=_guess(shapes),
        )
    scales = _Scales(what, metadata)
    return Layout(
        low_rank=tuple(_low_rank(what, place, parts, shapes, targets, scales) for place, parts in modules.items())
    )


def _low_rank(
    what: str,
    place: Place,
    parts: Mapping[str, str],
    shapes: Shapes,
    targets: Mapping[str, Shapes],
    scales: _Scales,
) -> LowRank:
    absent = [name for name in ("down", "up") if name not in parts]
    if absent:
        raise BadRequestError(f"{what} is incomplete: {place.module} has no {absent[0]} matrix", hint=_MERGE_HINT)
    down, up = shapes[parts["down"]], shapes[parts["up"]]
    mid = shapes[parts["mid"]] if "mid" in parts else None
    parameter = f"{place.module}.weight"
    target = targets[place.component][parameter]
    product = _product(down, up, mid)
    if product is None or ("alpha" in parts and math.prod(shapes[parts["alpha"]]) != 1):
        factors = [written(shape) for shape in (up, mid, down) if shape is not None]
        raise BadRequestError(f"{what} is damaged: the factors of {place.module} are {', '.join(factors)}")
    if kernel_free(product) != kernel_free(target):
        raise BadRequestError(
            f"{what} does not fit this model: its {place.module} is {written(product)}, the model's {written(target)}",
            hint=_guess(shapes),
        )
    return LowRank(
        component=place.component,
        parameter=parameter,
        down=parts["down"],
        up=parts["up"],
        mid=parts.get("mid"),
        alpha=parts.get("alpha"),
        factor=scales.factor(place, down[0]),
    )


def _product(down: Shape, up: Shape, mid: Shape | None) -> Shape | None:
    """Shape of the weight that the factors multiply to; None if they do not."""
    if len(down) < 2 or len(up) < 2 or 0 in down or math.prod(up[2:]) != 1:
        return None
    if mid is None:
        return (up[0], *down[1:]) if up[1] == down[0] else None
    if mid[:2] != (up[1], down[0]) or math.prod(down[2:]) != 1:
        return None
    return (up[0], down[1], *mid[2:])


class _Scales:
    """alpha / r of modules, as diffusers notes it for peft: in the file's metadata; 1 where nothing is noted."""

    def __init__(self, what: str, metadata: Mapping[str, str]) -> None:
        self._what = what
        self._noted: Mapping[str, Any] = {}
        text = metadata.get("lora_adapter_metadata")
        if text is not None:
            try:
                self._noted = dict(json.loads(text))
            except (ValueError, TypeError) as error:
                raise BadRequestError(f"{what}: its lora_adapter_metadata cannot be read: {error}") from error

    def factor(self, place: Place, rank: int) -> float:
        if not any(name.startswith(f"{place.component}.") for name in self._noted):
            return 1.0

        def noted(name: str, default: Any) -> Any:
            return self._noted.get(f"{place.component}.{name}", default)

        # 8 is what peft takes where nothing is said.
        alpha = noted("lora_alpha", 8)
        for pattern, value in (noted("alpha_pattern", None) or {}).items():
            plain = pattern.removeprefix("^")
            if not re.fullmatch(r"[\w.]+", plain):
                raise BadRequestError(f"{self._what}: its alpha_pattern {pattern!r} is no plain module name")
            whole = pattern.startswith("^")
            if place.module == plain or (not whole and place.module.endswith(f".{plain}")):
                alpha = value
                break
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise BadRequestError(f"{self._what}: its lora_alpha {alpha!r} is no number")
        return alpha / math.sqrt(rank) if noted("use_rslora", False) else alpha / rank


def _guess(shapes: Shapes) -> str:
    """The remedy, with what the LoRA was made for if the width of the text that it takes tells."""
    for key, shape in shapes.items():
        found = role(key)
        if found is not None and found[1] == "down" and re.search(r"attn2[._](processor\.)?to_k$", found[0]):
            made_for = _TEXT_WIDTHS.get(shape[-1])
            if made_for:
                return f"it was made for {made_for}, to judge by the width of its text, {shape[-1]}"
    return OTHER_MODEL_HINT

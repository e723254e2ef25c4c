"""What the names of tensors in LoRA files mean: which factor of which module. No torch.

Files are written by peft and diffusers (``unet.mid_block..to_q.lora_A.weight``, and older forms), by kohya's scripts
and LyCORIS (``lora_unet_mid_block_.._to_q.lora_down.weight``), which for SDXL take the names of `ldm_names`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from featstore.models.headers import Shapes
from featstore.models.ldm_names import unet_names

_ROLES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
}
"""Ends of names. The last line of each pair's writers: peft, diffusers (three generations), kohya."""

_KOHYA = re.compile(r"(?:lora_(unet|transformer|te\d?)|lycoris)_(.+)")
_COMPONENT = re.compile(r"(unet|transformer|text_encoder(?:_\d)?)\.(.+)")
_DENOISERS = ("unet", "transformer")
_OLD_ATTENTION = {"to_out": "to_out.0"}
_OLD_TEXT_ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a tensor is in."""

    component: str
    """Name of the network: ``unet``, ``transformer``, ``text_encoder``, ``text_encoder_2``."""
    module: str
    """Name of its module, as the model has it."""


class Names:
    """The modules of one model by all the names that files give them.

    Args:
        targets: the shapes of the model's parameters, by component.
    """

    def __init__(self, targets: Mapping[str, Shapes]) -> None:
        self._denoiser = next((name for name in _DENOISERS if name in targets), _DENOISERS[0])
        self._modules: dict[tuple[str, str], str] = {}
        for component, parameters in targets.items():
            modules = {name.removesuffix(".weight") for name in parameters if name.endswith(".weight")}
            names = {_bare(component, module): module for module in modules}
            if component == "unet":
                names |= {old: module for module, old in unet_names(modules).items()}
            for name, module in names.items():
                self._modules[component, name] = module
                self._modules[component, name.replace(".", "_")] = module

    def place(self, written: str) -> Place | None:
        """The module that a file means by a name (without what `role` splits off); None: the model has none."""
        kohya, dotted = _KOHYA.fullmatch(written), _COMPONENT.fullmatch(written)
        if kohya is not None:
            component, name = self._kohya_component(kohya[1]), kohya[2]
        elif dotted is not None:
            component, name = dotted[1], dotted[2]
        else:
            component, name = self._denoiser, written
        name = _today(_bare(component, name))
        module = self._modules.get((component, name))
        return None if module is None else Place(component=component, module=module)

    def _kohya_component(self, short: str | None) -> str:
        if short is None or not short.startswith("te"):
            return self._denoiser
        return "text_encoder" if short in ("te", "te1") else f"text_encoder_{short[2:]}"


def role(key: str) -> tuple[str, str] | None:
    """The module's name in a tensor's name, and what the tensor is to it: down, up, mid or alpha; None: no idea."""
    for end, kind in _ROLES.items():
        if key.endswith(end):
            return key.removesuffix(end), kind
    return None


def _bare(component: str, name: str) -> str:
    """A name without what some versions of transformers put before those of a CLIP text encoder."""
    if not component.startswith("text_encoder"):
        return name
    return name.removeprefix("text_model.").removeprefix("text_model_")


def _today(name: str) -> str:
    """A name of today for one of diffusers' attention processors: ``attn1.processor.to_out`` is ``attn1.to_out.0``."""
    before, _, last = name.rpartition(".")
    if before.endswith(".processor"):
        return f"{before.removesuffix('.processor')}.{_OLD_ATTENTION.get(last, last)}"
    if before.endswith(".self_attn"):
        return f"{before}.{_OLD_TEXT_ATTENTION.get(last, last)}"
    return name

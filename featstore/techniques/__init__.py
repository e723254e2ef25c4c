"""How a pass is steered: the expression parser, and one module a technique. No torch.

A new technique is one module with the names of `featstore.techniques.base.Kind`, and one line here.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from featstore.errors import BadRequestError
from featstore.techniques import basic, cfg, controlnet, ip_adapter, lora, prompt
from featstore.techniques.base import (
    TECHNIQUES,
    ControlNetRef,
    Draft,
    IPAdapterRef,
    Kind,
    LoraRef,
    Part,
    Request,
    Steering,
    SteeringOptions,
    Technique,
)
from featstore.techniques.expression import parse

if TYPE_CHECKING:
    from featstore.datasets.base import Dataset
    from featstore.models.source import ModelSource

__all__ = [
    "TECHNIQUES",
    "ControlNetRef",
    "IPAdapterRef",
    "Kind",
    "LoraRef",
    "Part",
    "Steering",
    "SteeringOptions",
    "Technique",
    "parse",
    "resolve",
]

TECHNIQUES.register("basic", basic)
TECHNIQUES.register("prompt", prompt)
TECHNIQUES.register("controlnet", controlnet)
TECHNIQUES.register("lora", lora)
TECHNIQUES.register("ip-adapter", ip_adapter)
TECHNIQUES.register("cfg", cfg)


def resolve(
    technique: Technique,
    *,
    dataset: Dataset,
    model: ModelSource,
    options: SteeringOptions | None = None,
    dataset_name: str | None = None,
    asked: str | None = None,
) -> Steering:
    """Find and digest all that a technique needs. Reads files, loads nothing.

    Args:
        technique: what `parse` returned.
        dataset: gives the texts.
        model: gives its own ControlNets and LoRAs.
        options: what is asked of all techniques.
        dataset_name: name that the data set's LoRAs are looked up by; None: the data set's own.
        asked: how the user named data set and model, as options of a command line, for hints.

    Raises:
        NotFoundError: if a ControlNet or LoRA is not there; the message says what to give.
        BadRequestError: if one does not fit, is a pickle, the data set lacks the text, or the technique means
            nothing for this kind of model.
    """
    request = Request(
        dataset=dataset,
        model=model,
        options=options or SteeringOptions(),
        dataset_name=dataset_name or dataset.info.name,
        asked=asked or shlex.join(["--dataset", dataset.info.name, "--model", model.name]),
    )
    model.check_prompt_chunks(request.options.prompt_chunks)
    # A model that takes no text is not told apart by one.
    draft = Draft(prompt=dataset.info.plain_prompt if model.text_tokens else "")
    for part in technique.parts:
        if part.name != "basic" and part.name not in model.techniques:
            reason = model.unsupported.get(part.name)
            raise BadRequestError(
                f"technique {part.name!r} means nothing for model {model.name!r} ({type(model).__name__})"
                if reason is None
                else f"technique {part.name!r} cannot steer model {model.name!r} ({type(model).__name__}): {reason}",
                hint=f"it can be steered by: {', '.join(sorted({'basic', *model.techniques}))}",
            )
        TECHNIQUES[part.name].apply(part, request, draft)
    return Steering(
        technique=technique,
        prompt=draft.prompt,
        caption_kind=draft.caption_kind,
        captions=draft.captions,
        caption_source=draft.caption_source,
        controlnets=tuple(draft.controlnets),
        loras=tuple(draft.loras),
        ip_adapters=tuple(draft.ip_adapters),
        guidance=draft.guidance,
        prompt_chunks=request.options.prompt_chunks,
    )

"""What a technique expression is, and what it resolves to. No torch."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from featstore.errors import BadRequestError
from featstore.registry import Registry
from featstore.techniques.detectors import DetectorRef

if TYPE_CHECKING:
    from featstore.datasets.base import Dataset
    from featstore.datasets.captions import Captions
    from featstore.models.source import ModelSource


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One technique of a pass: ``controlnet:canny`` is name ``controlnet``, variant ``canny``."""

    name: str
    """Lower-case name of the technique."""
    variant: str | None = None
    """What stands after the colon; lower case unless it is a path; None: nothing does."""
    scale: float | None = None
    """What stands after ``@``: the part's strength, in place of that asked of all; None: nothing does."""

    def __str__(self) -> str:
        variant = "" if self.variant is None else f":{self.variant}"
        return f"{self.name}{variant}{'' if self.scale is None else f'@{_plain(self.scale)}'}"

    @property
    def path(self) -> Path | None:
        """The variant as a path, if it looks like one: it holds a slash or has a weight file's suffix."""
        if self.variant is None or not looks_like_path(self.variant):
            return None
        return Path(self.variant).expanduser()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Technique:
    """One pass: the parts that act on it together."""

    expression: str
    """As typed, technique names in lower case; what people see and recipes hold."""
    parts: tuple[Part, ...]
    """The parts, in the order typed."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetRef:
    """A ControlNet on this machine."""

    folder: Path
    """Its diffusers folder."""
    digest: str
    """SHA-256 of its configuration and weights."""
    detector: DetectorRef
    """What makes its condition from the image."""
    scale: float
    """Factor on its residuals."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoraRef:
    """A LoRA on this machine."""

    path: Path
    """Its .safetensors file."""
    digest: str
    """SHA-256 of the file."""
    scale: float
    """Factor on what it adds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IPAdapterRef:
    """An IP-Adapter on this machine."""

    path: Path
    """Its .safetensors file."""
    image_encoder: Path
    """Folder of the CLIP vision model that sees the image for it."""
    digest: str
    """SHA-256 of the file and of the image encoder."""
    scale: float
    """Factor on what it adds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """A technique with everything found and digested: all that steers a pass, besides the image."""

    technique: Technique
    """What was asked for."""
    prompt: str | None
    """The text of the pass; None: one text an image."""
    caption_kind: str | None = None
    """Which of the data set's per-image texts is used; None where ``prompt`` or ``captions`` is set."""
    captions: Captions | None = None
    """Texts of a caption file; None where ``prompt`` or ``caption_kind`` is set."""
    caption_source: str | None = None
    """Identity of the per-image texts; None where ``prompt`` is set."""
    prompt_chunks: int = 1
    """Chunks that every text of the pass is encoded in; see `SteeringOptions.prompt_chunks`."""
    controlnets: tuple[ControlNetRef, ...] = ()
    """ControlNets; their residuals are added up in this order."""
    loras: tuple[LoraRef, ...] = ()
    """LoRAs, all enabled."""
    ip_adapters: tuple[IPAdapterRef, ...] = ()
    """IP-Adapters, fed with the image itself."""
    guidance: float | None = None
    """Scale of classifier-free guidance; None: the conditional pass alone."""

    @property
    def expression(self) -> str:
        """The technique expression as people see it."""
        return self.technique.expression

    def parameters(self) -> dict[str, Any]:
        """Everything about the steering that decides a feature's bytes, as plain JSON for `Recipe.parameters`."""
        parameters: dict[str, Any] = {
            "prompt": self.prompt,
            "captions": self.caption_source,
            "controlnets": [
                {"digest": ref.digest, "condition": ref.detector.parameters(), "scale": ref.scale}
                for ref in self.controlnets
            ],
            "loras": [{"digest": ref.digest, "scale": ref.scale} for ref in self.loras],
        }
        # Only where they act: what other techniques add must not rename runs that do without them.
        if self.ip_adapters:
            parameters["ip_adapters"] = [{"digest": ref.digest, "scale": ref.scale} for ref in self.ip_adapters]
        if self.guidance is not None:
            parameters["guidance"] = self.guidance
        if self.prompt_chunks > 1:
            parameters["prompt_chunks"] = self.prompt_chunks
        return parameters


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SteeringOptions:
    """What is asked of all techniques of an extraction beside their expression."""

    prompt: str | None = None
    """A text that replaces the data set's fixed detailed one."""
    captions: Path | None = None
    """Caption file that `prompt:caption` takes its texts from; None: the data set's own captions."""
    prompt_chunks: int = 1
    """How many chunks of 75 tokens each text is encoded in by models whose text encoders are CLIP's.

    1: as diffusers' pipelines do, what is left of a longer text is cut with a warning. More: chunks are encoded one
    by one and put side by side, shorter texts are filled up with empty chunks, and maps of cross-attention have that
    many times the channels. See `featstore.models.tokens.chunked_ids`."""
    controlnet_scale: float = 1.0
    """Factor on ControlNets' residuals; a part's own ``@`` goes before it, as before those of the others."""
    lora_scale: float = 1.0
    """Factor on what LoRAs add."""
    ip_adapter_scale: float = 1.0
    """Factor on what IP-Adapters add."""
    guidance_scale: float = 7.5
    """Scale of classifier-free guidance, for passes with ``cfg``."""
    allow_pickle: bool = False
    """Whether weights may be read from pickles, which can run code."""

    def __post_init__(self) -> None:
        """Refuse scales that are no numbers."""
        for name in ("controlnet_scale", "lora_scale", "ip_adapter_scale", "guidance_scale"):
            if not math.isfinite(getattr(self, name)):
                raise BadRequestError(f"{name} {getattr(self, name)} is not a finite number")
        if self.prompt_chunks < 1:
            raise BadRequestError(f"--prompt-chunks {self.prompt_chunks} is not 1 or more")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What techniques are resolved against."""

    dataset: Dataset
    """The data set to be extracted."""
    model: ModelSource
    """The model to be run."""
    options: SteeringOptions
    """What is asked of all techniques."""
    dataset_name: str
    """Name that the data set's LoRAs are found by."""
    asked: str
    """How the user named data set and model, as options of a command line that hints print."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Draft:
    """A `Steering` in the making; it begins as that of ``basic``."""

    prompt: str | None
    """See `Steering.prompt`."""
    caption_kind: str | None = None
    """See `Steering.caption_kind`."""
    captions: Captions | None = None
    """See `Steering.captions`."""
    caption_source: str | None = None
    """See `Steering.caption_source`."""
    controlnets: list[ControlNetRef] = dataclasses.field(default_factory=list)
    """See `Steering.controlnets`."""
    loras: list[LoraRef] = dataclasses.field(default_factory=list)
    """See `Steering.loras`."""
    ip_adapters: list[IPAdapterRef] = dataclasses.field(default_factory=list)
    """See `Steering.ip_adapters`."""
    guidance: float | None = None
    """See `Steering.guidance`."""


class Kind(Protocol):
    """One technique: a module with these names."""

    TITLE: str
    """What it does, a sentence."""
    VARIANTS: str
    """What may stand after the colon, for people; empty: nothing may."""
    REPEATABLE: bool
    """Whether a pass may have several, with different variants."""
    SCALED: bool
    """Whether ``@`` may give it a scale."""

    def check(self, part: Part) -> None:
        """Refuse a variant that the technique does not have, before anything is looked for."""

    def apply(self, part: Part, request: Request, draft: Draft) -> None:
        """Find what the part needs and write it into the draft."""


TECHNIQUES: Registry[Kind] = Registry("technique")
"""All techniques by name."""


def _plain(number: float) -> str:
    """The shortest decimal that is this number, without an exponent (whose plus would end the part)."""
    return format(Decimal(repr(number)), "f").removesuffix(".0")


def looks_like_path(variant: str) -> bool:
    """Whether a variant is a path rather than a name; also if it is a path with a name before it, ``depth=PATH``."""
    return bool(set("/\\=") & set(variant)) or variant.startswith("~") or Path(variant).suffix in _WEIGHT_SUFFIXES


_WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".pkl")

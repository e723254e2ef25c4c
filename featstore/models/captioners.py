"""Captioners: models of transformers that write a text for an image. No torch.

A captioner is a folder in transformers' layout, or a repository of the Hugging Face Hub. A new kind is one line in
`KINDS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from featstore.errors import BadRequestError, NotFoundError
from featstore.models.digests import files_sha256
from featstore.models.files import TRANSFORMERS_STEM, WeightFiles, read_json, weight_files
from featstore.models.hub import HubId
from featstore.models.parts import Part
from featstore.models.weights_root import DEFAULT_ROOT, asked_root

if TYPE_CHECKING:
    from featstore.models.backbones.captioner import Captioner

_SMALL = (".json", ".txt", ".model")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaptionerKind:
    """How one architecture is asked for a caption."""

    model: str
    """Its class in transformers."""
    processor: str
    """Class of its processor in transformers."""
    prompt: str = ""
    """What it is asked unless another prompt is given; empty: nothing, it is shown the image alone."""
    ends_prompts: bool = False
    """Whether its tokenizer ends a prompt with an end token, after which nothing would be written."""
    drops_end: bool = False
    """Whether it takes that token off by itself."""


KINDS: Mapping[str, CaptionerKind] = {
    "blip": CaptionerKind(
        model="BlipForConditionalGeneration", processor="BlipProcessor", ends_prompts=True, drops_end=True
    ),
    "blip-2": CaptionerKind(model="Blip2ForConditionalGeneration", processor="Blip2Processor"),
    "git": CaptionerKind(model="GitForCausalLM", processor="GitProcessor", ends_prompts=True),
    "kosmos-2": CaptionerKind(
        model="Kosmos2ForConditionalGeneration",
        processor="Kosmos2Processor",
        # What the seed code asks.
        prompt="Give a detailed description of this image, including any subject matter, style of art if any, "
        "and the context:",
    ),
}
"""Kinds by ``model_type`` of their ``config.json``."""


class CaptionerSource:
    """A captioner's folder. Creating one reads its configuration, never weights.

    Args:
        name: what the user called it.
        folder: the folder, with ``config.json``.

    Raises:
        NotFoundError: if configuration or weights are missing.
        BadRequestError: if it is no captioner of a kind that is known, or its weights are pickles.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        config = read_json(folder / "config.json", f"captioner {name!r}")
        kind, classes = str(config.get("model_type")), config.get("architectures") or []
        if kind not in KINDS or (classes and KINDS[kind].model not in classes):
            raise BadRequestError(
                f"captioner {name!r} is a {', '.join(classes) or kind}; this version takes "
                f"{', '.join(known.model for known in KINDS.values())}"
            )
        self.kind = KINDS[kind]
        self.weights: WeightFiles = weight_files(folder, TRANSFORMERS_STEM)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over every file that decides what it writes: weights, configurations, tokenizer, processor."""
        small = {path for path in self.folder.iterdir() if path.is_file() and path.suffix in _SMALL}
        return files_sha256(self.folder, small | set(self.weights.files))

    def load(self, device: str, compute_dtype: str) -> Captioner:
        """Load the weights, frozen, onto a device; see `featstore.models.ModelSource.load`."""
        from featstore.models.backbones.captioner import Captioner

        return Captioner(self, device=device, compute_dtype=compute_dtype)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Files(Part):
    """A captioner's files."""

    head: ClassVar = "config.json"
    include: ClassVar = ("*.json", "*.txt", "*.model", "*.safetensors")

    def _weighted(self, snapshot: Path) -> Mapping[Path, str]:
        return {snapshot: TRANSFORMERS_STEM}

    def _check_whole(self, folder: Path) -> None:
        weight_files(folder, TRANSFORMERS_STEM)

    def _small_files(self, files: Collection[str]) -> list[str]:
        return [file for file in files if "/" not in file and Path(file).suffix in _SMALL]


def open_captioner(name: str) -> CaptionerSource:
    """The captioner in a folder, or that of an id of the Hub, fetched if it is nowhere on this machine.

    Args:
        name: a path, ``owner/name`` or ``owner/name@revision``. A folder that is there goes before an id.

    Raises:
        NotFoundError: if it is not there and cannot be fetched, or files are missing.
        BadRequestError: if it is no captioner of a kind that is known, or its weights are pickles.
        StorageError: if fetching it fails half way.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return CaptionerSource(name, folder)
    hub = HubId.parse(name)
    if hub is None:
        raise NotFoundError(
            f"there is no captioner folder {name}",
            hint="name a folder, or an id of the Hugging Face Hub, e.g. Salesforce/blip-image-captioning-base",
        )
    own = (asked_root() or DEFAULT_ROOT) / hub.name
    return CaptionerSource(name, _Files(what=f"captioner {name!r}", folder=own, hub=hub).find())

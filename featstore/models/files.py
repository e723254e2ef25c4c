"""Which files of a diffusers folder are loaded, and so decide the bytes of features.

Safetensors only, unless pickles are allowed; those are read with ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from featstore.errors import BadRequestError, NotFoundError

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
_PICKLE_STEMS = {TRANSFORMERS_STEM: "pytorch_model"}
"""What pickles are called where it is not the same."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The weights of one component."""

    files: tuple[Path, ...]
    """What is read, index and shards included."""
    variant: str | None
    """``variant=`` of ``from_pretrained``: ``fp16`` where only half-precision files are there."""
    pickled: bool = False
    """Whether they are pickles."""


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        NotFoundError: if the file is absent.
        BadRequestError: if it is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"{what}: no {path.name} in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise BadRequestError(f"{what}: {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise BadRequestError(f"{what}: {path} holds no JSON object")
    return value


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The file that weights begin with: they are all in it, or it is the index that names the others."""

    name: str
    """Name of the file."""
    variant: str | None
    """See `WeightFiles`."""
    pickled: bool
    """See `WeightFiles`."""

    @property
    def index(self) -> bool:
        """Whether it is an index."""
        return self.name.endswith(".json")


def choose_weights(names: Collection[str], folder: str, stem: str, *, allow_pickle: bool = False) -> Choice:
    """What ``from_pretrained`` reads of a folder's files: plain files before half-precision ones, pickles last.

    Args:
        names: names of the files in the folder.
        folder: the folder, for messages.
        stem: how the component's weight files begin.
        allow_pickle: whether pickles are taken where there is nothing else.

    Raises:
        NotFoundError: if there are no weights.
        BadRequestError: if there are only pickles, which can run code when they are read.
    """
    kinds = [(stem, ".safetensors", False)]
    if allow_pickle:
        kinds.append((_PICKLE_STEMS.get(stem, stem), ".bin", True))
    for start, suffix, pickled in kinds:
        for variant in (None, "fp16"):
            dot = f".{variant}" if variant else ""
            for name in (f"{start}{dot}{suffix}", f"{start}{suffix}.index{dot}.json"):
                if name in names:
                    return Choice(name=name, variant=variant, pickled=pickled)
    pickles = sorted(name for name in names if Path(name).suffix in _PICKLES)
    if pickles and not allow_pickle:
        raise BadRequestError(
            f"{folder} has its weights only as a pickle ({pickles[0]}); weights are read from .safetensors only",
            hint="convert them (diffusers: `save_pretrained(.., safe_serialization=True)`), fetch the safetensors, or, "
            "if you trust whoever made them, say --allow-pickle",
        )
    raise NotFoundError(f"no weights in {folder}: neither {stem}.safetensors nor its index is there")


def weight_files(folder: Path, stem: str, *, allow_pickle: bool = False) -> WeightFiles:
    """The weights that ``from_pretrained(folder)`` reads, as `choose_weights` has it.

    Raises:
        NotFoundError: if there are none, or a shard is missing.
        BadRequestError: if there are only pickles and they are not allowed.
    """
    names = {path.name for path in folder.glob("*") if path.is_file()}
    choice = choose_weights(names, str(folder), stem, allow_pickle=allow_pickle)
    path = folder / choice.name
    files = (path, *shards(path)) if choice.index else (path,)
    for file in files:
        if not file.is_file():
            raise NotFoundError(f"weights in {folder} are incomplete: {file.name} is missing")
    return WeightFiles(files=files, variant=choice.variant, pickled=choice.pickled)


def refuse_pickle(path: Path, what: str, *, allow_pickle: bool | None = None) -> None:
    """Refuse a file that is not ``.safetensors``.

    Args:
        path: the file.
        what: what it is, for the message.
        allow_pickle: whether pickles are taken; None: they never are here.

    Raises:
        BadRequestError: for a pickle that is not allowed, and for any other suffix.
    """
    if path.suffix in _PICKLES:
        if allow_pickle:
            return
        either = "" if allow_pickle is None else ", or, if you trust whoever made it, say --allow-pickle"
        raise BadRequestError(
            f"{what} {path} is a pickle ({path.suffix}), which can run code when it is read; "
            "weights are read from .safetensors only",
            hint=f"convert it to safetensors{either}",
        )
    if path.suffix != ".safetensors":
        raise BadRequestError(f"{what} {path} is no .safetensors file")


def shards(index: Path) -> list[Path]:
    """The weight files that an index names, whether they are there or not.

    Raises:
        BadRequestError: if it names files elsewhere or of another kind.
        NotFoundError: if it names none.
    """
    suffix = ".bin" if ".bin.index" in index.name else ".safetensors"
    names = sorted(set(read_json(index, "weight index").get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name or not name.endswith(suffix):
            raise BadRequestError(f"{index} names {name!r}, which is no {suffix} file beside it")
    if not names:
        raise NotFoundError(f"{index} names no weights")
    return [index.parent / name for name in names]

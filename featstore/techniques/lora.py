"""``lora``: low-rank weights trained on the data set's style."""

from __future__ import annotations

from pathlib import Path

from featstore.errors import BadRequestError, NotFoundError
from featstore.models.digests import file_sha256
from featstore.models.files import refuse_pickle
from featstore.models.headers import adaptable_shapes, read_header
from featstore.models.lora_layout import layout
from featstore.models.trained import check_model
from featstore.techniques.base import Draft, LoraRef, Part, Request

TITLE = "low-rank weights trained on the data set's own style"
VARIANTS = (
    "overfit, or the path of a .safetensors file (LoRA, LoCon, merged checkpoint; with --allow-pickle .ckpt too) "
    "or of a folder with pytorch_lora_weights.safetensors"
)
REPEATABLE = True
SCALED = True

_FILE_NAME = "pytorch_lora_weights.safetensors"


def check(part: Part) -> None:
    """Which variants there are is for the model to say."""


def apply(part: Part, request: Request, draft: Draft) -> None:
    """Find the LoRA, and check names and shapes of what is in it against the model's.

    Raises:
        NotFoundError: if the model has none for the data set and no path is given, or the file is missing.
        BadRequestError: if it is damaged, does not fit the model, is a pickle, or in the pass already.
    """
    path = _file(part.path or _default(part, request), allow_pickle=request.options.allow_pickle)
    _check_fit(path, request)
    digest = file_sha256(path)
    if any(ref.digest == digest for ref in draft.loras):
        raise BadRequestError(
            f"the LoRA {path} is twice in one pass", hint="name it once; for a stronger effect give it a scale: @2"
        )
    scale = request.options.lora_scale if part.scale is None else part.scale
    draft.loras.append(LoraRef(path=path, digest=digest, scale=scale))


def _default(part: Part, request: Request) -> Path:
    model, name = request.model, request.dataset_name
    folder = model.lora_folder(name, part.variant)
    if folder is not None:
        check_model(folder, model=model.name, weights_digest=model.weights_digest)
        return folder
    variants = model.lora_variants(name)
    if part.variant is not None and variants:
        raise NotFoundError(
            f"model {model.name!r} has no LoRA variant {part.variant!r} for data set {name!r}; "
            f"it has lora and {', '.join(f'lora:{variant}' for variant in variants)}",
            hint=f"for a folder write lora:./{part.variant}",
        )
    what = "LoRA" if part.variant is None else f"LoRA {part.variant!r}"
    raise NotFoundError(
        f"model {model.name!r} has no {what} for data set {name!r}",
        hint=_remedy(part, request),
    )


def _remedy(part: Part, request: Request) -> str:
    """How to come by a LoRA that is not there."""
    file = "give a file: lora:PATH.safetensors"
    if part.variant not in (None, "overfit") or not request.model.trains_lora:
        return file
    options = request.asked if part.variant is None else f"{request.asked} --overfit"
    return f"`featstore train-lora {options}` trains it; or {file}"


def _check_fit(path: Path, request: Request) -> None:
    # Of pickles nothing is known before they are loaded.
    targets = adaptable_shapes(request.model) if path.suffix == ".safetensors" else None
    if targets is not None:
        header = read_header(path, f"LoRA {path}")
        layout(f"LoRA {path}", header.shapes, header.metadata, targets)


def _file(path: Path, *, allow_pickle: bool) -> Path:
    if path.is_dir():
        file = path / _FILE_NAME
        if not file.is_file():
            raise NotFoundError(f"LoRA folder {path} has no {_FILE_NAME}")
        return file
    refuse_pickle(path, "LoRA", allow_pickle=allow_pickle)
    if not path.is_file():
        raise NotFoundError(f"there is no LoRA file {path}")
    return path

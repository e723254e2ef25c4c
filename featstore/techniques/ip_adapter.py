"""``ip-adapter``: the image itself, seen by a CLIP vision model, beside the text."""

from __future__ import annotations

from pathlib import Path

from featstore.errors import BadRequestError, NotFoundError
from featstore.models.digests import files_sha256
from featstore.models.files import TRANSFORMERS_STEM, refuse_pickle, weight_files
from featstore.techniques.base import Draft, IPAdapterRef, Part, Request

TITLE = "an IP-Adapter, which shows the image itself to the cross-attention"
VARIANTS = (
    "none: the model's own; the path of an IP-Adapter .safetensors file, with the folder image_encoder beside it; "
    "`@0.6` after it scales"
)
REPEATABLE = False
SCALED = True

_ENCODER = "image_encoder"


def check(part: Part) -> None:
    """Refuse variants that are no path."""
    if part.variant is not None and part.path is None:
        raise BadRequestError(
            f"technique 'ip-adapter' has no variant {part.variant!r}; it is `ip-adapter` or `ip-adapter:PATH`",
            hint=f"for a file write ip-adapter:./{part.variant}",
        )


def apply(part: Part, request: Request, draft: Draft) -> None:
    """Find the IP-Adapter and its image encoder.

    Raises:
        NotFoundError: if the model has none of its own and no path is given, or files are missing.
        BadRequestError: if it is a pickle.
    """
    path = _file(part.path or request.model.ip_adapter_folder(), request)
    encoder = _encoder(path)
    files = [path, encoder / "config.json", *weight_files(encoder, TRANSFORMERS_STEM).files]
    prepare = encoder / "preprocessor_config.json"
    root = path.parent if encoder.parent == path.parent else path.parent.parent
    digest = files_sha256(root, [*files, *([prepare] if prepare.is_file() else [])])
    scale = request.options.ip_adapter_scale if part.scale is None else part.scale
    draft.ip_adapters.append(IPAdapterRef(path=path, image_encoder=encoder, digest=digest, scale=scale))


def _file(path: Path | None, request: Request) -> Path:
    if path is None:
        raise NotFoundError(
            f"model {request.model.name!r} has no IP-Adapter of its own",
            hint="give one: ip-adapter:PATH.safetensors, with the folder image_encoder beside it "
            "(h94/IP-Adapter has both, in its folder models)",
        )
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise NotFoundError(f"the folder {path} holds not one IP-Adapter .safetensors but: {names}")
        return found[0]
    refuse_pickle(path, "IP-Adapter")
    if not path.is_file():
        raise NotFoundError(f"there is no IP-Adapter file {path}")
    return path


def _encoder(path: Path) -> Path:
    for folder in (path.parent / _ENCODER, path.parent.parent / _ENCODER):
        if (folder / "config.json").is_file():
            return folder
    raise NotFoundError(
        f"the image encoder of IP-Adapter {path} is not there: no {path.parent / _ENCODER}",
        hint="it is a CLIP vision model in transformers' layout (h94/IP-Adapter has it in models/image_encoder)",
    )

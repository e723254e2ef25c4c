"""``controlnet``: a ControlNet fed with what a detector sees in the image itself; several add up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featstore.errors import BadRequestError, NotFoundError, unknown_name
from featstore.models.digests import files_sha256
from featstore.models.files import DIFFUSERS_STEM, read_json, refuse_pickle, weight_files
from featstore.models.source import ModelSource
from featstore.techniques.base import ControlNetRef, Draft, Part, Request
from featstore.techniques.detectors import DETECTORS, find

TITLE = "a ControlNet fed with the image's own edges, depth, line drawing or poses; several add up"
VARIANTS = f"{', '.join(DETECTORS)}; DETECTOR=PATH for a folder fed with it, PATH for one fed with canny; @SCALE after"
REPEATABLE = True
SCALED = True

_DEFAULT = "canny"
_NAMED = re.compile(r"[^/\\.~=]+=")
_SAME = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")
_SAME_OR_NONE = (
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
)


def check(part: Part) -> None:
    """Refuse variants that are neither a detector nor a path, and paths that are given to an unknown detector."""
    detector, folder = _split(part)
    if part.variant is not None and part.variant.endswith("="):
        raise BadRequestError(f"there is no folder after {part.variant!r}", hint=f"write controlnet:{part.variant}PATH")
    if detector in DETECTORS:
        return
    if folder is not None:
        error = unknown_name("detector", detector, DETECTORS)
    else:
        error = unknown_name("variant of technique 'controlnet'", detector, [*DETECTORS, "PATH of a folder"])
    near = f"{error.hint} For" if error.hint else "for"
    raise BadRequestError(str(error), hint=f"{near} a folder write controlnet:./{part.variant}")


def apply(part: Part, request: Request, draft: Draft) -> None:
    """Find the ControlNet and the weights of its detector, and check that it fits the model.

    Raises:
        NotFoundError: if the model has none of its own and no folder is given, or files are missing.
        BadRequestError: if it does not fit, is there already, or weights are a pickle.
    """
    name, folder = _split(part)
    if folder is None:
        variant = DETECTORS[name].controlnet
        folder = request.model.controlnet_folder(variant)
        if folder is None:
            raise NotFoundError(
                f"model {request.model.name!r} has no {variant} ControlNet of its own",
                hint=f"give the folder of one: controlnet:{'' if name == _DEFAULT else f'{name}='}PATH, or put it "
                f"beside the model's as controlnet-{variant}",
            )
    if folder.is_file():
        _refuse_file(folder)
    if not folder.is_dir():
        raise NotFoundError(f"there is no ControlNet folder {folder}")
    _check_fit(folder, request.model)
    detector = find(name, weights_root=request.model.weights_root, allow_pickle=request.options.allow_pickle)
    weights = weight_files(folder, DIFFUSERS_STEM, allow_pickle=request.options.allow_pickle)
    files = [folder / "config.json", *weights.files]
    digest = files_sha256(folder, files)
    if any((ref.digest, ref.detector) == (digest, detector) for ref in draft.controlnets):
        raise BadRequestError(f"the ControlNet {folder} is twice in one pass")
    scale = request.options.controlnet_scale if part.scale is None else part.scale
    draft.controlnets.append(ControlNetRef(folder=folder, digest=digest, detector=detector, scale=scale))


def _split(part: Part) -> tuple[str, Path | None]:
    """Name of the detector, and the folder if one is given.

    ``depth=PATH`` names both; a folder whose own name has such a beginning is written with ``./`` before it.
    """
    variant = part.variant or _DEFAULT
    named = _NAMED.match(variant)
    if named:
        return named[0].removesuffix("=").strip(), Path(variant[named.end() :].strip()).expanduser()
    return (variant, None) if part.path is None else (_DEFAULT, part.path)


def _refuse_file(path: Path) -> None:
    refuse_pickle(path, "ControlNet")
    with path.open("rb") as stream:
        # The names of tensors stand at the beginning of a safetensors file.
        if b'"lora_controlnet"' in stream.read(1 << 20):
            raise BadRequestError(f"{path} is a Control-LoRA, not a ControlNetModel")
    raise BadRequestError(f"ControlNet {path} is a file; a diffusers folder with config.json is needed")


def _check_fit(folder: Path, model: ModelSource) -> None:
    """Refuse a ControlNet whose residuals or inputs are not those of the model."""
    unet = model.denoiser_config
    config = read_json(folder / "config.json", "ControlNet")
    if config.get("_class_name") != "ControlNetModel":
        raise BadRequestError(f"{folder} holds a {config.get('_class_name')}, not a ControlNetModel")
    for key in (*_SAME, *_SAME_OR_NONE):
        if config.get(key) != unet.get(key):
            raise BadRequestError(
                f"ControlNet {folder} is of another architecture than model {model.name!r}: "
                f"{key} is {config.get(key)}, the model's is {unet.get(key)}"
            )
    _check_condition(folder, config, model)


def _check_condition(folder: Path, config: Mapping[str, Any], model: ModelSource) -> None:
    widths = config.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)
    if 2 ** (len(widths) - 1) != model.latent_factor:
        raise BadRequestError(
            f"ControlNet {folder} reduces its condition {2 ** (len(widths) - 1)} times, "
            f"model {model.name!r} its images {model.latent_factor} times"
        )
    if config.get("conditioning_channels", 3) != 3:
        raise BadRequestError(
            f"ControlNet {folder} takes {config['conditioning_channels']} channels; conditions have 3"
        )
    if config.get("global_pool_conditions"):
        raise BadRequestError(
            f"ControlNet {folder} pools what it adds over the whole image (global_pool_conditions), as those fed with "
            "a shuffled image do; what a detector sees at a place would be lost"
        )

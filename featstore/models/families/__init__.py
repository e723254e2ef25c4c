"""Kinds of pipelines, one module a family: what their configuration files say of layers and sizes. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from featstore.errors import BadRequestError, NotFoundError
from featstore.models.families.ddpm import DDPM
from featstore.models.families.pixart import PixArtAlpha, PixArtSigma
from featstore.models.families.sd3 import StableDiffusion3
from featstore.models.families.sdxl import StableDiffusionXL
from featstore.models.families.stable_diffusion import StableDiffusion
from featstore.models.files import read_json
from featstore.models.source import ModelSource, Place

__all__ = ["FAMILIES", "open_folder"]

FAMILIES: dict[str, type[ModelSource]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionImg2ImgPipeline": StableDiffusion,
    "StableDiffusionControlNetPipeline": StableDiffusion,
    "DDPMPipeline": DDPM,
    "DDIMPipeline": DDPM,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusionXLImg2ImgPipeline": StableDiffusionXL,
    "StableDiffusionXLControlNetPipeline": StableDiffusionXL,
    "PixArtAlphaPipeline": PixArtAlpha,
    "PixArtSigmaPipeline": PixArtSigma,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "StableDiffusion3Img2ImgPipeline": StableDiffusion3,
}
"""Families by the pipeline class that ``model_index.json`` names."""


def open_folder(
    name: str,
    folder: Path,
    *,
    controlnets: Mapping[str, Place] | None = None,
    loras: Mapping[tuple[str, str | None], Path] | None = None,
    allow_pickle: bool = False,
    absent: NotFoundError | None = None,
) -> ModelSource:
    """The model in a pipeline folder, whatever its family. Reads configuration files, never weights.

    Args:
        name: public name.
        folder: the folder, with ``model_index.json``.
        controlnets: see `ModelSource`.
        loras: see `ModelSource`.
        allow_pickle: see `ModelSource`.
        absent: see `ModelSource`.

    Raises:
        NotFoundError: if the folder or one of its configuration files is absent.
        BadRequestError: for a pipeline of a kind that is not known.
    """
    if not folder.is_dir():
        raise NotFoundError(f"model {name!r}: there is no folder {folder}")
    kind = read_json(folder / "model_index.json", f"model {name!r}").get("_class_name")
    if kind not in FAMILIES:
        raise BadRequestError(
            f"model {name!r} in {folder} is a {kind}; this version takes {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[kind](name, folder, controlnets=controlnets, loras=loras, allow_pickle=allow_pickle, absent=absent)

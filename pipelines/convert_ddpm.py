"""A checkpoint of guided-diffusion, such as those of ddpm-segmentation, made into a diffusers folder."""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.errors import BadRequestError, NotFoundError, StorageError
from featstore.pipelines.guided_diffusion import Architecture, architecture, odd_key, origins, rows_of_part
from featstore.pipelines.whole_folder import whole_folder

if TYPE_CHECKING:
    import torch

_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConvertDDPMConfig:
    """What to convert, and what a state dict does not say of itself."""

    checkpoint: Path
    """The state dict: a pickle (``.pt``), or the same tensors in ``.safetensors``."""
    folder: Path
    """Folder to write; it must not exist, or be empty."""
    allow_pickle: bool = False
    """Whether a pickle may be read. Only tensors are unpickled, but a pickle is not a format for strangers' data."""
    image_size_px: int = 256
    """Side of the images that the model was trained on."""
    head_channels: int = 64
    """Channels of an attention head, guided-diffusion's ``num_head_channels``."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConvertDDPMReport:
    """What was written."""

    folder: Path
    made: Architecture
    image_size_px: int
    parameters: int
    """Number of weights."""

    def to_json(self) -> dict[str, Any]:
        """The report for ``--json``."""
        sides = [self.image_size_px // 2**level for level, attends in enumerate(self.made.attends) if attends]
        return {
            "folder": str(self.folder),
            "model": f"ddpm:{self.folder}",
            "image_size_px": self.image_size_px,
            "widths": list(self.made.widths),
            "layers_per_block": self.made.resnets,
            "attention_at_px": sides,
            "learned_variance": self.made.out_channels > self.made.in_channels,
            "parameters": self.parameters,
        }


def convert_ddpm(config: ConvertDDPMConfig) -> ConvertDDPMReport:
    """Write a checkpoint of guided-diffusion's unconditional UNet as a folder of diffusers' ``DDPMPipeline``.

    The architecture is read from the tensors' names and shapes; the schedule is that of all its unconditional
    models at 256 px: 1000 steps, linear betas from 1e-4 to 0.02. The folder appears whole or not at all.

    Raises:
        NotFoundError: if there is no such checkpoint.
        BadRequestError: if it is a pickle and those are not allowed, is no such checkpoint (names the key that does
            not fit), or the folder is taken.
        StorageError: if the folder cannot be written.
    """
    if config.folder.exists() and (not config.folder.is_dir() or any(config.folder.iterdir())):
        raise BadRequestError(f"{config.folder} exists already", hint="name another folder, or remove this one")
    state = _read(config.checkpoint, allow_pickle=config.allow_pickle)
    made = architecture({key: tuple(value.shape) for key, value in state.items()})
    settings = made.unet_config(image_size_px=config.image_size_px, head_channels=config.head_channels)
    parameters = _write(state, made, settings, config)
    return ConvertDDPMReport(folder=config.folder, made=made, image_size_px=config.image_size_px, parameters=parameters)


def _read(path: Path, *, allow_pickle: bool) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise NotFoundError(f"there is no checkpoint {path}")
    if path.suffix != ".safetensors" and not allow_pickle:
        raise BadRequestError(
            f"{path} is a pickle ({path.suffix or 'no suffix'}), which can run code when it is read",
            hint="--allow-pickle reads it, tensors only, if you trust where it comes from",
        )
    import safetensors.torch
    import torch

    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise BadRequestError(f"{path} cannot be read as a state dict: {first}") from error
    if not isinstance(state, Mapping):
        raise BadRequestError(f"{path} holds a {type(state).__name__}, no state dict")
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise odd_key(str(key), f"is a {type(value).__name__}, where a tensor is expected")
    return dict(state)


def _write(
    state: Mapping[str, torch.Tensor], made: Architecture, settings: Mapping[str, Any], config: ConvertDDPMConfig
) -> int:
    """Write the folder; the number of weights in it."""
    import safetensors
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from featstore.models.quiet import quiet

    with torch.device("meta"):
        unet = UNet2DModel(**settings)
    unet.load_state_dict(_renamed(state, made, unet.state_dict(), config.head_channels), assign=True)
    learned = made.out_channels > made.in_channels
    scheduler = DDPMScheduler(**_SCHEDULE, variance_type="learned_range" if learned else "fixed_large")
    try:
        with whole_folder(config.folder) as folder, quiet():
            DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise StorageError(f"{config.folder} cannot be written: {error}") from error
    return sum(parameter.numel() for parameter in unet.parameters())


def _renamed(
    state: Mapping[str, torch.Tensor], made: Architecture, wanted: Mapping[str, torch.Tensor], head_channels: int
) -> dict[str, torch.Tensor]:
    """The tensors under diffusers' names, float32; every one of the checkpoint is used, every one wanted is made."""
    import torch

    known, used = origins(made), set()
    renamed = {}
    for name, like in wanted.items():
        origin = known[name]
        if origin.key not in state:
            raise odd_key(origin.key, "is missing")
        used.add(origin.key)
        value = state[origin.key]
        shape, part = tuple(value.shape), origin.part
        whole = tuple(like.shape) if part is None else (3 * like.shape[0], *like.shape[1:])
        # Attention is a convolution over positions there, and a linear map here.
        if shape not in (whole, (*whole, 1)):
            raise odd_key(origin.key, f"has shape {shape}, where {whole} is expected")
        value = value.reshape(whole).float()
        if part is not None:
            value = torch.cat([value[rows] for rows in rows_of_part(like.shape[0], head_channels, part)])
        renamed[name] = value.contiguous()
    for key in state:
        if key not in used:
            raise odd_key(key, "has no place in the UNet that the others make")
    return renamed

"""What every family does to load: checked weights, devices, and errors that name the folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import nn

from featstore.errors import BadRequestError, FeatstoreError, NotFoundError
from featstore.models.backbones.schedules import Diffusion
from featstore.models.files import WeightFiles, read_json
from featstore.models.quiet import quiet
from featstore.models.source import ModelSource

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def torch_dtype(name: str) -> torch.dtype:
    """The element type of a name in `DTYPES`.

    Raises:
        BadRequestError: for another.
    """
    if name not in DTYPES:
        raise BadRequestError(f"compute dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def torch_device(name: str) -> torch.device:
    """The device of a name, if it is there.

    Raises:
        BadRequestError: if it is not.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadRequestError(f"{name!r} is no torch device; examples: cpu, cuda, cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadRequestError(f"device {name!r}: torch sees no CUDA device here", hint="use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadRequestError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices, from cuda:0 on")
    return device


def pretrained(kind: Any, folder: Path, weights: WeightFiles, dtype: torch.dtype) -> Any:
    """A model of diffusers from its folder, whole.

    Raises:
        NotFoundError: if tensors are missing.
        BadRequestError: if the folder is damaged.
    """
    return _whole(kind, folder, weights, torch_dtype=dtype)


def pretrained_text(kind: Any, folder: Path, weights: WeightFiles, dtype: torch.dtype) -> Any:
    """A text encoder of transformers from its folder, whole.

    Raises:
        NotFoundError: if tensors are missing.
        BadRequestError: if the folder is damaged.
    """
    return _whole(kind, folder, weights, dtype=dtype)


def _whole(kind: Any, folder: Path, weights: WeightFiles, **options: Any) -> Any:
    with quiet(), errors_about(str(folder)):
        model, info = kind.from_pretrained(
            folder,
            use_safetensors=not weights.pickled,
            variant=weights.variant,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
        if info["missing_keys"]:
            # Both libraries would leave them random and only warn.
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise NotFoundError(f"weights in {folder} lack {len(info['missing_keys'])} tensors ({missing}, ..)")
        return model


def freeze(model: nn.Module, device: torch.device) -> Any:
    """The model in eval mode on the device, without gradients."""
    return model.to(device).eval().requires_grad_(False)


def diffusion_schedule(source: ModelSource, device: torch.device) -> Diffusion:
    """The schedule that a model's folder gives, its table on the device.

    Raises:
        BadRequestError: if the model predicts neither the noise nor v.
    """
    config = read_json(source.component_folder("scheduler") / "scheduler_config.json", f"model {source.name!r}")
    with quiet():
        scheduler = DDPMScheduler.from_config(config)
    predicts = config.get("prediction_type", "epsilon")
    if predicts not in ("epsilon", "v_prediction"):
        raise BadRequestError(
            f"model {source.name!r} predicts {predicts!r}; this version takes epsilon or v_prediction"
        )
    return Diffusion(scheduler.alphas_cumprod.to(device, torch.float32), predicts)


@contextlib.contextmanager
def errors_about(what: str) -> Iterator[None]:
    """Turn the many ways in which a damaged folder fails to load into one error that names it."""
    try:
        yield
    except FeatstoreError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise BadRequestError(
            f"{what} cannot be loaded: {type(error).__name__}: {lines[0] if lines else 'no message'}",
            hint="check that the folder is complete and made by diffusers' save_pretrained",
        ) from error

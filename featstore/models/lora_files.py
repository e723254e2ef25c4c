"""The tensors of LoRA files, as they are stored. Layouts: see `lora_layout`."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from featstore.errors import BadRequestError
from featstore.models.headers import Shapes, read_header
from featstore.models.lora_layout import Layout, layout

Tensors = dict[str, torch.Tensor]


def read_lora(path: Path, targets: Mapping[str, Shapes]) -> tuple[Layout, Tensors]:
    """What a file does to a model, with the tensors that do it, on the CPU, in the types of the file.

    Pickles are read with torch's restricted loader, which builds tensors and plain containers only; whether they may
    be read at all is for the caller to have decided.

    Args:
        path: a .safetensors file, or a pickle.
        targets: shapes of the model's parameters by component.

    Raises:
        NotFoundError: if there is no such file.
        BadRequestError: if it is damaged, holds more than tensors, or does not fit the model.
    """
    what = f"LoRA {path}"
    if path.suffix != ".safetensors":
        tensors = _unpickled(path, what)
        found = layout(what, {name: tuple(value.shape) for name, value in tensors.items()}, {}, targets)
        tensors = {name: tensors[name] for name in _used(found)}
    else:
        header = read_header(path, what)
        found = layout(what, header.shapes, header.metadata, targets)
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in _used(found)}
    for name, value in tensors.items():
        if not value.is_floating_point() and value.numel() > 1:
            raise BadRequestError(f"{what}: its {name} is of type {value.dtype}, not of floating-point numbers")
        if not torch.isfinite(value).all():
            raise BadRequestError(f"{what} is damaged: its {name} is not finite")
    return found, tensors


def _used(found: Layout) -> Collection[str]:
    names = [name for one in found.low_rank for name in (one.down, one.up, one.mid, one.alpha) if name is not None]
    return dict.fromkeys([*names, *(one.stored.key for one in found.replaced)])


def _unpickled(path: Path, what: str) -> Tensors:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise BadRequestError(
            f"{what} cannot be read as plain weights: {type(error).__name__}: {lines[0] if lines else 'no message'}",
            hint="open it where you trust it and save its tensors as safetensors",
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {str(name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise BadRequestError(f"{what} holds no tensors by name")
    return tensors

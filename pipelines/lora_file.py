"""A trained LoRA as files: the weights, and a JSON file that says what they were trained on."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import safetensors
import torch
import transformers
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from safetensors.torch import save as save_tensors

import featstore
from featstore.errors import StorageError
from featstore.models.trained import LORA_FILE, NOTES_FILE
from featstore.pipelines.lora_pupil import Pupil
from featstore.recipe import sha256_hex
from featstore.whole_file import write_whole

_TEXT_PREFIX = "text_model."


def lora_bytes(pupil: Pupil) -> bytes:
    """The low-rank weights as a safetensors file in diffusers' layout, float16, with rank and alpha in its header.

    The same weights give the same bytes.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    for name, module in pupil.modules.items():
        # Recent versions of transformers leave out a prefix that all other readers of such files expect.
        prefix = _TEXT_PREFIX if name != "unet" and not hasattr(module, "text_model") else ""
        for key, value in convert_state_dict_to_diffusers(get_peft_model_state_dict(module)).items():
            tensors[f"{name}.{prefix}{key}"] = value.detach().to("cpu", torch.float16).contiguous()
        metadata |= {f"{name}.{key}": value for key, value in pupil.metadata[name].items()}
    # One entry only: safetensors writes several in an order that changes from call to call.
    return save_tensors(tensors, metadata={LORA_ADAPTER_METADATA_KEY: json.dumps(metadata, indent=2, sort_keys=True)})


def versions() -> dict[str, str]:
    """Versions of all that decides what a training gives."""
    return {
        "featstore": featstore.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "safetensors": safetensors.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_lora(folder: Path, weights: bytes, notes: Mapping[str, Any]) -> Path:
    """Put the weights and the notes into a folder, which is made if need be; files of those names are replaced.

    The weights, which are what is looked for, come last, and whole or not at all.

    Args:
        folder: where to.
        weights: content of the safetensors file.
        notes: plain JSON; the digest of the weights is added.

    Returns:
        The file of the weights.

    Raises:
        StorageError: if the folder cannot be written.
        ValueError: for notes with NaN or infinities.
    """
    document = {**notes, "weights_sha256": sha256_hex(weights)}
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / NOTES_FILE, text)
        write_whole(folder / LORA_FILE, weights)
    except OSError as error:
        raise StorageError(f"cannot write the LoRA to {folder}: {error}", hint="check space and permissions") from error
    return folder / LORA_FILE

"""Writes the trained networks as stock folders in float16, and packs them to be carried away.

``<out>/pipeline``, ``<out>/controlnet-canny``, ``<out>/lora``, ``<out>/lora-overfit``, ``<out>/ip-adapter``.
"""

from __future__ import annotations

import copy
import logging
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from featstore.errors import NotFoundError
from featstore.pipelines.reference.config import TrainConfig
from featstore.pipelines.reference.networks import build_scheduler

logger = logging.getLogger(__name__)

PIPELINE, CONTROLNET, LORA, LORA_OVERFIT = "pipeline", "controlnet-canny", "lora", "lora-overfit"
IP_ADAPTER, IMAGE_ENCODER = "ip-adapter", "image_encoder"
"""The IP-Adapter's folder, and the folder in it of the model that sees for it."""
IP_ADAPTER_FILE = "ip_adapter.safetensors"
PART_BYTES = 15 * 2**20
"""Largest part of the packed weights."""

M = TypeVar("M", bound=torch.nn.Module)


def half_copy(module: M) -> M:
    """A float16 copy of ``module`` on the CPU, laid out as files want it."""
    copied = copy.deepcopy(module).to("cpu", torch.float16).to(memory_format=torch.contiguous_format)
    return copied.requires_grad_(False).eval()


def replace_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a new folder, then put it in the place of ``folder``."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def export_pipeline(
    folder: Path,
    *,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write a StableDiffusionPipeline folder in float16; the given networks stay as they are."""
    pipeline = StableDiffusionPipeline(
        vae=half_copy(vae),
        unet=half_copy(unet),
        text_encoder=half_copy(text_encoder),
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    replace_folder(folder, pipeline.save_pretrained)


def export_controlnet(folder: Path, controlnet: ControlNetModel) -> None:
    """Write a ControlNet folder in float16."""
    replace_folder(folder, half_copy(controlnet).save_pretrained)


def load_pipeline(folder: Path, device: str) -> StableDiffusionPipeline:
    """The exported pipeline, its float16 weights held in float32, frozen, without a progress bar."""
    if not (folder / "model_index.json").is_file():
        raise NotFoundError(f"there is no pipeline in {folder}", hint="the stages vae and unet make it")
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, safety_checker=None, requires_safety_checker=False
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False).eval()
    return pipeline


def size_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def pack(config: TrainConfig) -> None:
    """Pack what exists so far into ``<work>/pack``: weights.tar in parts of 15 MiB, and report.tar.

    ``cat weights.tar.* | tar x`` restores the weights. A failure is logged, never raised: packing serves
    only to carry results away.
    """
    folder = config.work / "pack"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _pack_weights(config.out, folder)
        with tarfile.open(folder / "report.tar.gz", "w:gz") as tar:
            for source in (config.work / "logs", config.work / "probes", config.report):
                if source.exists():
                    tar.add(source, arcname=source.name)
    except OSError as error:
        logger.warning("packing failed: %s", error)


def _pack_weights(out: Path, folder: Path) -> None:
    whole = folder / "weights.partial"
    with tarfile.open(whole, "w") as tar:
        for name in (PIPELINE, CONTROLNET, LORA, LORA_OVERFIT, IP_ADAPTER):
            if (out / name).exists():
                tar.add(out / name, arcname=name)
    data = whole.read_bytes()
    whole.unlink()
    for old in folder.glob("weights.tar.*"):
        old.unlink()
    for number, start in enumerate(range(0, len(data), PART_BYTES)):
        (folder / f"weights.tar.{number:02d}").write_bytes(data[start : start + PART_BYTES])

"""Denoising of real images, and the measures by which results are judged."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from torch import Tensor

from featstore.pipelines.reference.data import add_noise
from featstore.pipelines.reference.lora import tokenize
from featstore.pipelines.reference.pool import edges_of


@torch.no_grad()
def denoise(
    pipeline: StableDiffusionPipeline,
    latents: Tensor,
    prompts: list[str],
    start: int,
    *,
    controlnet: ControlNetModel | None = None,
    hints: Tensor | None = None,
    embeddings: Tensor | None = None,
    stride: int = 10,
    seed: int = 0,
) -> Tensor:
    """Add noise at timestep ``start`` and take it away again by DDIM, without guidance.

    Args:
        pipeline: the model, with or without adapters.
        latents: (B, 4, 16, 16) scaled latents of the images.
        prompts: B prompts.
        start: timestep of the noise.
        controlnet: steers every pass if given.
        hints: (B, 3, 64, 64) edges in {0, 1} for it.
        embeddings: (B, D) what a loaded IP-Adapter is shown; needed if there is one.
        stride: timesteps between two passes.
        seed: of the noise.

    Returns:
        (B, 3, 64, 64) decoded pixels, about in [-1, 1].
    """
    device = latents.device
    alphas = pipeline.scheduler.alphas_cumprod.to(device)
    words = pipeline.text_encoder(tokenize(pipeline, prompts))[0]
    noise = torch.randn(latents.shape, generator=torch.Generator("cpu").manual_seed(seed)).to(device)
    at = torch.full((len(latents),), start, device=device)
    x = add_noise(latents, noise, alphas, at)
    timesteps = list(range(start, 0, -stride))
    for timestep, following in zip(timesteps, [*timesteps[1:], 0], strict=True):
        at = torch.full((len(latents),), timestep, device=device)
        extra: dict[str, Any] = {}
        if embeddings is not None:
            extra["added_cond_kwargs"] = {"image_embeds": [embeddings[:, None]]}
        if controlnet is not None:
            down, mid = controlnet(x, at, words, controlnet_cond=hints, return_dict=False)
            extra |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        predicted = pipeline.unet(x, at, words, return_dict=False, **extra)[0]
        alpha, then = alphas[timestep], alphas[following]
        clean = (x - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
        x = then.sqrt() * clean + (1 - then).sqrt() * predicted if following else clean
    return decode(pipeline, x)


@torch.no_grad()
def decode(pipeline: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """Pixels (B, 3, 64, 64) of scaled latents."""
    pixels: Tensor = pipeline.vae.decode(latents / float(pipeline.vae.config.scaling_factor), return_dict=False)[0]
    return pixels


def foreground_iou(predicted: Tensor, truth: Tensor) -> float:
    """Mean over images of the intersection over union of what is not background; both (B, 64, 64)."""
    a, b = (predicted != 0).flatten(1), (truth != 0).flatten(1)
    union = (a | b).sum(dim=1).clamp_min(1)
    return float(((a & b).sum(dim=1) / union).float().mean())


def accuracy(predicted: Tensor, truth: Tensor) -> float:
    """Share of equal labels."""
    return float((predicted == truth).float().mean())


def edge_f1(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    """Agreement of the Canny edges of two stacks (B, 64, 64, 3) uint8, with a tolerance of one pixel."""
    scores = []
    kernel = np.ones((3, 3), np.uint8)
    for first, second in zip(a, b, strict=True):
        one, two = edges_of(first) > 0, edges_of(second) > 0
        wide_one = cv2.dilate(one.astype(np.uint8), kernel) > 0
        wide_two = cv2.dilate(two.astype(np.uint8), kernel) > 0
        precision = (two & wide_one).sum() / max(1, two.sum())
        recall = (one & wide_two).sum() / max(1, one.sum())
        scores.append(2 * precision * recall / max(1e-9, precision + recall))
    return float(np.mean(scores))


def sharpness(images: npt.NDArray[np.uint8]) -> float:
    """Mean over (B, 64, 64, 3) uint8 images of the variance of the Laplacian."""
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images]
    return float(np.mean([cv2.Laplacian(image, cv2.CV_64F).var() for image in grey]))


def mean_iou(confusion: npt.NDArray[np.int64]) -> tuple[float, list[float]]:
    """Mean IoU over the classes that occur, and the IoU of every class (NaN where it does not occur).

    Args:
        confusion: (classes, classes), rows the truth.
    """
    hit = np.diag(confusion).astype(float)
    present = confusion.sum(axis=1) > 0
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - hit
    by_class = np.where(present, hit / np.maximum(union, 1), np.nan)
    return float(np.nanmean(by_class)), by_class.tolist()

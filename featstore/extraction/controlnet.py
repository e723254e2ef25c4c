"""What a ControlNet is fed, and what it adds to the UNet.

Shapes: B images in the batch, H W height and width of the model's input in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from featstore.extraction.images import UInt8Array
from featstore.models.backbones.transfer import to_device


def condition(seen: Sequence[UInt8Array], device: torch.device) -> torch.Tensor:
    """What detectors saw, uint8 (H, W, 3) an image, for a ControlNet: float32 (B, 3, H, W) in [0, 1], on the device."""
    # A quarter of the bytes on the way there.
    stacked = to_device(torch.from_numpy(np.stack(seen)), device)
    return stacked.permute(0, 3, 1, 2).to(torch.float32).div(255.0).contiguous()


def residuals(
    controlnets: Sequence[tuple[Any, torch.Tensor, float]], inputs: Mapping[str, Any]
) -> dict[str, tuple[torch.Tensor, ...] | torch.Tensor]:
    """Arguments of the UNet's ``forward`` with the residuals of all ControlNets, added up.

    Args:
        controlnets: (stock ``ControlNetModel``, its condition (B, 3, H, W), factor on its residuals).
        inputs: the UNet's other arguments, which ControlNets share.
    """
    down: list[torch.Tensor] = []
    middle: torch.Tensor | None = None
    for model, image, scale in controlnets:
        more, mid = model(controlnet_cond=image, conditioning_scale=scale, return_dict=False, **inputs)
        down = [a + b for a, b in zip(down, more, strict=True)] if down else list(more)
        middle = mid if middle is None else middle + mid
    if middle is None:
        return {}
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}

"""Tensors on their way from the host to the device."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, of the same shape and type.

    A GPU is not waited for: the copy runs from pinned memory, in order with the work that is under way there. A copy
    from ordinary memory would hold up the host until all of that work is done. torch's allocator of pinned memory
    keeps the buffer until the copy is done.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

"""Initial parameters of plain torch modules, drawn from a generator instead of torch's global state."""

from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def draw_parameters(module: nn.Module, generator: torch.Generator) -> None:
    """Draw the parameters of all convolutions and linear layers again, as torch itself draws them.

    Args:
        module: changed in place; its other parameters, such as those of norms, are left as they are.
        generator: on the CPU, as the module is.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(part.weight, a=math.sqrt(5), generator=generator)
            if part.bias is not None:
                bound = 1 / math.sqrt(part.weight[0].numel())
                nn.init.uniform_(part.bias, -bound, bound, generator=generator)

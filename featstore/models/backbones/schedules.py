"""Noise schedules: how rows are noised, and one deterministic step back.

Shapes: B rows, C h w channels, height and width of what is noised.
"""

from __future__ import annotations

import torch


def ddpm_noised(clean: torch.Tensor, noise: torch.Tensor, timestep: int, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """``sqrt(a_t) x + sqrt(1 - a_t) noise`` (Ho et al., 2020, eq. 4), in float32, in the dtype of ``clean``.

    Args:
        clean: (B, C, h, w).
        noise: of the same shape.
        timestep: index into ``alphas_cumprod``; exactly what the denoiser is fed.
        alphas_cumprod: (1000,), the cumulative products of 1 - beta.
    """
    share = alphas_cumprod[timestep].to(device=clean.device, dtype=torch.float32)
    noised = share.sqrt() * clean.float() + (1.0 - share).sqrt() * noise.to(clean.device, torch.float32)
    return noised.to(clean.dtype)


def ddim_step(
    noised: torch.Tensor,
    prediction: torch.Tensor,
    timestep: int,
    earlier: int,
    alphas_cumprod: torch.Tensor,
    prediction_type: str = "epsilon",
) -> torch.Tensor:
    """One DDIM step with eta 0 (Song et al., 2021, eq. 12), in float32, in the dtype of ``noised``.

    Args:
        noised: (B, C, h, w) at ``timestep``.
        prediction: the model's noise or v, (B, C, h, w).
        timestep: index into ``alphas_cumprod``.
        earlier: index of the result.
        alphas_cumprod: (1000,).
        prediction_type: ``epsilon`` or ``v_prediction``.
    """
    now, then = (alphas_cumprod[t].to(device=noised.device, dtype=torch.float32) for t in (timestep, earlier))
    x, out = noised.float(), prediction.float()
    if prediction_type == "v_prediction":
        clean = now.sqrt() * x - (1.0 - now).sqrt() * out
        epsilon = now.sqrt() * out + (1.0 - now).sqrt() * x
    else:
        clean = (x - (1.0 - now).sqrt() * out) / now.sqrt()
        epsilon = out
    return (then.sqrt() * clean + (1.0 - then).sqrt() * epsilon).to(noised.dtype)


def flow_noised(clean: torch.Tensor, noise: torch.Tensor, level: float) -> torch.Tensor:
    """``(1 - s) x + s noise``, a rectified flow (Liu et al., 2023, eq. 2), in float32, in the dtype of ``clean``.

    Args:
        clean: (B, C, h, w).
        noise: of the same shape.
        level: s, the share of the noise, in 0..1.
    """
    return ((1.0 - level) * clean.float() + level * noise.to(clean.device, torch.float32)).to(clean.dtype)


def flow_step(noised: torch.Tensor, prediction: torch.Tensor, level: float, earlier: float) -> torch.Tensor:
    """One Euler step of a flow, in float32, in the dtype of ``noised``.

    Args:
        noised: (B, C, h, w) at share ``level`` of the noise.
        prediction: the model's velocity, noise less signal, (B, C, h, w).
        level: s, in 0..1.
        earlier: share of the noise in the result, 0..``level``.
    """
    return (noised.float() + (earlier - level) * prediction.float()).to(noised.dtype)

"""Noise schedules: how rows are noised, and one deterministic step back.

Shapes: B rows, C h w channels, height and width of what is noised.
"""

from __future__ import annotations

import abc

import torch


class Schedule(abc.ABC):
    """How much noise each timestep stands for. All arithmetic is in float32."""

    @property
    @abc.abstractmethod
    def timesteps(self) -> int:
        """Number of timesteps."""

    @abc.abstractmethod
    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """Rows with noise at one timestep, in the dtype and on the device of ``clean``.

        Args:
            clean: (B, C, h, w).
            noise: of the same shape, standard normal.
            timestep: 0..timesteps - 1; exactly what the denoiser is fed.
        """

    @abc.abstractmethod
    def stepped(self, noised: torch.Tensor, prediction: torch.Tensor, timestep: int, earlier: int) -> torch.Tensor:
        """One deterministic denoising step from ``timestep`` to ``earlier``, in the dtype of ``noised``.

        Args:
            noised: (B, C, h, w) at ``timestep``.
            prediction: what the denoiser returned for it, (B, C, h, w).
            timestep: 0..timesteps - 1.
            earlier: 0..timestep.
        """


class Diffusion(Schedule):
    """A DDPM's schedule (Ho et al., 2020), stepped back along by DDIM with eta 0 (Song et al., 2021).

    Args:
        alphas_cumprod: float32 (timesteps,), the share of the signal that is left: the cumulative products of 1 - beta.
            On the device where rows are noised.
        prediction_type: what the denoiser predicts: ``epsilon``, the noise, or ``v_prediction`` (Salimans and Ho,
            2022).
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction_type: str = "epsilon") -> None:
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type

    @property
    def timesteps(self) -> int:
        """See `Schedule.timesteps`."""
        return len(self.alphas_cumprod)

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """``sqrt(a_t) x + sqrt(1 - a_t) noise`` (Ho et al., 2020, eq. 4); see `Schedule.noised`."""
        share = self._share(timestep, clean.device)
        noised = share.sqrt() * clean.float() + (1.0 - share).sqrt() * noise.to(clean.device, torch.float32)
        return noised.to(clean.dtype)

    def stepped(self, noised: torch.Tensor, prediction: torch.Tensor, timestep: int, earlier: int) -> torch.Tensor:
        """One DDIM step (Song et al., 2021, eq. 12); see `Schedule.stepped`."""
        now, then = (self._share(at, noised.device) for at in (timestep, earlier))
        x, out = noised.float(), prediction.float()
        if self.prediction_type == "v_prediction":
            clean = now.sqrt() * x - (1.0 - now).sqrt() * out
            epsilon = now.sqrt() * out + (1.0 - now).sqrt() * x
        else:
            clean = (x - (1.0 - now).sqrt() * out) / now.sqrt()
            epsilon = out
        return (then.sqrt() * clean + (1.0 - then).sqrt() * epsilon).to(noised.dtype)

    def _share(self, timestep: int, device: torch.device) -> torch.Tensor:
        # A view where the table lies on that device: a number copied there would be waited for.
        return self.alphas_cumprod[timestep].to(device=device, dtype=torch.float32)


class Flow(Schedule):
    """A rectified flow (Liu et al., 2023): timestep t stands for t / timesteps parts of noise; Euler steps back.

    Args:
        timesteps: how many there are.
    """

    def __init__(self, timesteps: int) -> None:
        self._timesteps = timesteps

    @property
    def timesteps(self) -> int:
        """See `Schedule.timesteps`."""
        return self._timesteps

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """``(1 - s) x + s noise`` (Liu et al., 2023, eq. 2) with s = t / timesteps; see `Schedule.noised`."""
        level = timestep / self.timesteps
        return ((1.0 - level) * clean.float() + level * noise.to(clean.device, torch.float32)).to(clean.dtype)

    def stepped(self, noised: torch.Tensor, prediction: torch.Tensor, timestep: int, earlier: int) -> torch.Tensor:
        """One Euler step along the predicted velocity, noise less signal; see `Schedule.stepped`."""
        level, target = timestep / self.timesteps, earlier / self.timesteps
        return (noised.float() + (target - level) * prediction.float()).to(noised.dtype)

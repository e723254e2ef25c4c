"""What extraction asks of a loaded model, whatever its family.

Shapes: B rows of a batch, C h w channels, height and width of what is noised (latents or pixels).
"""

from __future__ import annotations

import abc
import contextlib
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from featstore.models.source import ModelSource

if TYPE_CHECKING:
    from featstore.datasets.base import UInt8Array

Text = dict[str, torch.Tensor]
"""An encoded text by name, e.g. ``encoder_hidden_states``; the first axis is the batch. Empty: a model without text."""


class Backbone(abc.ABC):
    """Frozen stock modules on one device, in eval mode, without gradients.

    `close` gives the memory back; the backbone cannot be used after.
    """

    def __init__(self, source: ModelSource, *, denoiser: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.source = source
        self.denoiser: nn.Module = denoiser
        """The network that layers are read from: a stock UNet or transformer."""
        self.device = device
        self.dtype = dtype
        self._closed = False

    # images and text

    @abc.abstractmethod
    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """What is noised, for pixels: the scaled mean of the autoencoder's posterior, or the pixels themselves.

        Args:
            pixels: float32 (B, 3, H, W) in [-1, 1], on any device.

        Returns:
            (B, C, h, w) on the device, in the compute dtype.
        """

    @abc.abstractmethod
    def encode_text(self, text: str, chunks: int = 1) -> Text:
        """One text, encoded alone so that it does not depend on others; LoRAs act if the caller has enabled them.

        A text longer than the encoder takes is cut, with a warning that shows the tail.

        Args:
            text: the text.
            chunks: how many chunks it is encoded in, side by side; 1 for models that do not take more
                (`ModelSource.chunked_text`).
        """

    def encode_unguided(self, chunks: int = 1) -> Text:
        """What classifier-free guidance leads away from: the empty text, or what a model was trained to take for it.

        Args:
            chunks: as many as the text that it stands beside is encoded in; see `encode_text`.
        """
        return self.encode_text("", chunks)

    def offload_text(self) -> None:  # noqa: B027 - models without text have nothing to do
        """Take the text encoders off the device; `encode_text` brings them back."""

    # noise

    @abc.abstractmethod
    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """Rows (B, C, h, w) with noise of the same shape at one timestep, by the model's own schedule."""

    @abc.abstractmethod
    def stepped(self, noised: torch.Tensor, prediction: torch.Tensor, timestep: int, earlier: int) -> torch.Tensor:
        """One deterministic denoising step from ``timestep`` to ``earlier`` (DDIM with eta 0, or Euler for flows).

        Args:
            noised: (B, C, h, w) at ``timestep``.
            prediction: what the denoiser returned for it, (B, C, h, w).
            timestep: 0..999.
            earlier: 0..timestep.
        """

    @property
    @abc.abstractmethod
    def timesteps(self) -> int:
        """Number of timesteps of the schedule."""

    # the pass

    @abc.abstractmethod
    def inputs(
        self, noised: torch.Tensor, timesteps: torch.Tensor, text: Text, height_px: int, width_px: int
    ) -> dict[str, Any]:
        """Keyword arguments of the denoiser's ``forward``.

        Args:
            noised: (B, C, h, w).
            timesteps: (B,) integers on the device.
            text: of B rows.
            height_px: of the image.
            width_px: of the image.
        """

    def prediction(self, output: Any) -> torch.Tensor:
        """The predicted noise or velocity (B, C, h, w) in what the denoiser returned (``return_dict=False``)."""
        value: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return value[:, : self.source.latent_channels]

    # what steers

    def controlnet(self, folder: Path, digest: str) -> Any:
        """The stock ControlNet in a folder, loaded once for each digest."""
        raise NotImplementedError(f"{type(self).__name__} has no ControlNets")

    def lora(self, path: Path, digest: str) -> str:
        """Load the LoRA in a file once for each digest and return the name of its adapter; it stays disabled."""
        raise NotImplementedError(f"{type(self).__name__} has no LoRAs")

    def adapted(self, loras: Sequence[tuple[str, float]]) -> contextlib.AbstractContextManager[None]:
        """Context in which exactly these LoRAs (adapter name, scale) act."""
        if loras:
            raise NotImplementedError(f"{type(self).__name__} has no LoRAs")
        return contextlib.nullcontext()

    def ip_adapter(self, path: Path, image_encoder: Path, digest: str) -> None:
        """Load an IP-Adapter and its image encoder, once for each digest; it does not act yet."""
        raise NotImplementedError(f"{type(self).__name__} has no IP-Adapters")

    def looking(self, digest: str, scale: float) -> contextlib.AbstractContextManager[None]:
        """Context in which one IP-Adapter acts."""
        raise NotImplementedError(f"{type(self).__name__} has no IP-Adapters")

    def see(self, digest: str, image: UInt8Array | None) -> torch.Tensor:
        """What an IP-Adapter is fed for an image, uint8 (H, W, 3), or for none: one row of ``image_embeds``."""
        raise NotImplementedError(f"{type(self).__name__} has no IP-Adapters")

    # the end

    @abc.abstractmethod
    def _drop(self) -> None:
        """Forget every module but `denoiser`."""

    def close(self) -> None:
        """Drop every module, and hand the device's memory back. The backbone cannot be used again."""
        self._closed = True
        self._drop()
        if hasattr(self, "denoiser"):
            del self.denoiser
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"the backbone of {self.source.name!r} is closed; load it again")

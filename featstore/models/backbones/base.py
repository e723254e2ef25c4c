"""What extraction asks of a loaded model, whatever its family.

Shapes: B rows of a batch, C h w channels, height and width of what is noised (latents or pixels).
"""

from __future__ import annotations

import abc
import contextlib
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import nn

from featstore.errors import BadRequestError
from featstore.models.backbones.schedules import Schedule
from featstore.models.source import ModelSource

if TYPE_CHECKING:
    from featstore.datasets.base import UInt8Array

Text = dict[str, torch.Tensor]
"""An encoded text by name, e.g. ``encoder_hidden_states``; the first axis is the batch. Empty: a model without text."""


class Backbone(abc.ABC):
    """Frozen stock modules on one device, in eval mode, without gradients.

    `close` gives the memory back; the backbone cannot be used after.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        denoiser: nn.Module,
        schedule: Schedule,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.source = source
        self.denoiser: nn.Module = denoiser
        """The network that layers are read from: a stock UNet or transformer."""
        self.schedule = schedule
        """The model's own noise schedule."""
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

    @property
    def timesteps(self) -> int:
        """Number of timesteps of the schedule."""
        return self.schedule.timesteps

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """Rows (B, C, h, w) with noise of the same shape at one timestep; see `Schedule.noised`."""
        return self.schedule.noised(clean, noise, timestep)

    def stepped(self, noised: torch.Tensor, prediction: torch.Tensor, timestep: int, earlier: int) -> torch.Tensor:
        """One deterministic denoising step (B, C, h, w) from ``timestep`` to ``earlier``; see `Schedule.stepped`."""
        return self.schedule.stepped(noised, prediction, timestep, earlier)

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

    # what steers; a family that takes none of a kind leaves its methods as they are, to refuse it

    def controlnet(self, folder: Path, digest: str) -> Any:
        """The stock ControlNet in a folder, loaded once for each digest.

        Raises:
            BadRequestError: if the model takes none, or it does not fit the model.
        """
        self._refuse("ControlNets")

    def lora(self, path: Path, digest: str) -> str:
        """Load the LoRA in a file once for each digest and return the name of its adapter; it stays disabled.

        Raises:
            BadRequestError: if the model takes none, or it does not fit the model.
        """
        self._refuse("LoRAs")

    def adapted(self, loras: Sequence[tuple[str, float]]) -> contextlib.AbstractContextManager[None]:
        """Context in which exactly these LoRAs (adapter name, scale) act.

        Raises:
            BadRequestError: if there are some and the model takes none.
        """
        if loras:
            self._refuse("LoRAs")
        return contextlib.nullcontext()

    def ip_adapter(self, path: Path, image_encoder: Path, digest: str) -> None:
        """Load an IP-Adapter and its image encoder, once for each digest; it does not act yet.

        Raises:
            BadRequestError: if the model takes none, or it does not fit the model.
        """
        self._refuse("IP-Adapters")

    def looking(self, digest: str, scale: float) -> contextlib.AbstractContextManager[None]:
        """Context in which one IP-Adapter acts.

        Raises:
            BadRequestError: if the model takes none.
        """
        self._refuse("IP-Adapters")

    def see(self, digest: str, image: UInt8Array | None) -> torch.Tensor:
        """What an IP-Adapter is fed for an image, uint8 (H, W, 3), or for none: one row of ``image_embeds``.

        Raises:
            BadRequestError: if the model takes none.
        """
        self._refuse("IP-Adapters")

    def _refuse(self, what: str) -> NoReturn:
        """Refuse what models of this family do not take; ``what`` names it in the plural."""
        raise BadRequestError(
            f"model {self.source.name!r} ({type(self.source).__name__}) takes no {what}",
            hint=f"it can be steered by: {', '.join(sorted({'basic', *self.source.techniques}))}",
        )

    # the end

    @abc.abstractmethod
    def _drop(self) -> None:
        """Forget every module but `denoiser`."""

    def close(self) -> None:
        """Drop every module, and hand the device's memory back. The backbone cannot be used again."""
        self._closed = True
        self._drop()
        # The table of a schedule is on the device too.
        for name in ("denoiser", "schedule"):
            if hasattr(self, name):
                delattr(self, name)
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

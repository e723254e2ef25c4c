"""A loaded Stable Diffusion model with low-rank weights to be trained, and its loss.

The loss is the mean squared error of the predicted noise (or v, as the model's schedule says) at timesteps drawn
evenly (Ho et al., 2020, eq. 14), the adaptation that of Hu et al., 2021.

Shapes: N pictures, B rows of a batch, C h w channels, height and width of latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from featstore.models.backbones.base import Text
from featstore.models.backbones.stable_diffusion import StableDiffusionBackbone
from featstore.pipelines.lora_plan import TEXT_TARGETS, UNET_TARGETS, TrainLoraConfig

LOOK_AT = (100, 300, 500, 700, 900)
"""Timesteps that losses are measured at, in thousandths of the schedule."""
_MEASURED_ROWS = 8
_PLAIN_PIXELS = 512 * 512
"""Above this, activations are computed twice rather than kept: they would not fit common devices."""


class Pupil:
    """A loaded model with fresh low-rank weights, which alone are trained.

    Args:
        backbone: the model; what it computes changes in place.
        config: rank, alpha, seed, and whether the text encoders are trained.
        size_px: height and width of the pictures.
    """

    def __init__(self, backbone: StableDiffusionBackbone, config: TrainLoraConfig, size_px: tuple[int, int]) -> None:
        self.backbone, self._size_px = backbone, size_px
        self.modules: dict[str, Any] = {"unet": backbone.unet}
        if config.text_learning_rate > 0:
            names = ["text_encoder", *(f"text_encoder_{n}" for n in range(2, 1 + len(backbone.text_encoders)))]
            self.modules |= dict(zip(names, backbone.text_encoders, strict=True))
        self.metadata: dict[str, dict[str, Any]] = {}
        devices = [backbone.device] if backbone.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(config.seed)
            for name, module in self.modules.items():
                self._adapt(name, module, config)
        # Texts that nothing changes are encoded once.
        self._cache: dict[str, Text] | None = None if config.text_learning_rate else {}
        if size_px[0] * size_px[1] > _PLAIN_PIXELS:
            backbone.unet.enable_gradient_checkpointing()

    def _adapt(self, name: str, module: Any, config: TrainLoraConfig) -> None:
        targets = list(UNET_TARGETS if name == "unet" else TEXT_TARGETS)
        alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
        module.add_adapter(
            LoraConfig(r=config.rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets)
        )
        self.metadata[name] = {"r": config.rank, "lora_alpha": alpha, "target_modules": sorted(targets)}
        for parameter in self.parameters(name):
            # Steps of the optimiser are lost in half precision.
            parameter.data = parameter.data.to(torch.float32)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """What is trained in one of `modules`."""
        return [parameter for parameter in self.modules[name].parameters() if parameter.requires_grad]

    @property
    def all_parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [parameter for name in self.modules for parameter in self.parameters(name)]

    def _text(self, texts: Sequence[str]) -> Text:
        """The encoded texts, B rows; each is encoded once, however often it is there."""
        known: dict[str, Text] = self._cache if self._cache is not None else {}
        for text in texts:
            if text not in known:
                known[text] = self.backbone.text_states(text)
        return {name: torch.cat([known[text][name] for text in texts]) for name in known[texts[0]]}

    def loss(self, latents: Tensor, noise: Tensor, timesteps: Tensor, texts: Sequence[str]) -> Tensor:
        """Mean squared error (B,) of the prediction for each row, float32.

        Args:
            latents: (B, C, h, w) clean, as `Backbone.encode_images` gives them.
            noise: (B, C, h, w) standard normal, float32.
            timesteps: (B,) integers.
            texts: B texts.
        """
        backbone, device = self.backbone, self.backbone.device
        share = backbone.schedule.alphas_cumprod[timesteps.to(device)].view(-1, 1, 1, 1)
        clean, noise = latents.float(), noise.to(device)
        noised = share.sqrt() * clean + (1.0 - share).sqrt() * noise
        target = noise
        if backbone.schedule.prediction_type == "v_prediction":
            # Salimans and Ho, 2022, appendix D
            target = share.sqrt() * noise - (1.0 - share).sqrt() * clean
        half = backbone.dtype != torch.float32
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            inputs = backbone.inputs(noised.to(backbone.dtype), timesteps.to(device), self._text(texts), *self._size_px)
            predicted = backbone.prediction(backbone.unet(**inputs, return_dict=False))
        return (predicted.float() - target).square().flatten(1).mean(dim=1)

    @torch.no_grad()
    def mean_loss(self, latents: Tensor, text: str, *, seed: int) -> float:
        """The loss of pictures (N, C, h, w) with one text at `LOOK_AT`; its noise depends on the seed alone."""
        rng = torch.Generator("cpu").manual_seed(seed)
        count, steps = len(latents), self.backbone.timesteps
        noise = torch.randn((len(LOOK_AT), *latents.shape), generator=rng).flatten(0, 1)
        timesteps = torch.tensor([at * steps // 1000 for at in LOOK_AT]).repeat_interleave(count)
        total = 0.0
        for start in range(0, len(noise), _MEASURED_ROWS):
            end = min(start + _MEASURED_ROWS, len(noise))
            clean = latents[[row % count for row in range(start, end)]]
            total += float(self.loss(clean, noise[start:end], timesteps[start:end], [text] * len(clean)).sum())
        return total / len(noise)

"""The qualitative part: pictures remade by diffusers' own Img2Img pipelines, with the model's own scheduler.

Everything that steers a remaking is what steers a pass of extraction: the same texts, the same conditions of
ControlNets, LoRAs folded into the weights, IP-Adapters fed by the same eyes, `cfg` as the pipeline's guidance. What is
not asked for is absent: without `cfg` nothing is guided.

B images, C h w channels, height and width of latents, H W height and width in pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from featstore.models import ModelSource
from featstore.models.families.sdxl import StableDiffusionXL
from featstore.models.families.stable_diffusion import StableDiffusion
from featstore.models.files import read_json
from featstore.techniques import Steering

UInt8Array = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kinds:
    """Names in diffusers of a family's Img2Img pipelines, and of parts that it has beside the common ones."""

    plain: str
    with_controlnet: str
    text_encoders: dict[str, str]
    """Class in transformers by part."""
    options: dict[str, Any]
    """What constructors take beside the parts."""


_CLIP = {"text_encoder": "CLIPTextModel"}
_KINDS: dict[type[ModelSource], Kinds] = {
    StableDiffusion: Kinds(
        plain="StableDiffusionImg2ImgPipeline",
        with_controlnet="StableDiffusionControlNetImg2ImgPipeline",
        text_encoders=_CLIP,
        options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    StableDiffusionXL: Kinds(
        plain="StableDiffusionXLImg2ImgPipeline",
        with_controlnet="StableDiffusionXLControlNetImg2ImgPipeline",
        text_encoders={**_CLIP, "text_encoder_2": "CLIPTextModelWithProjection"},
        options={"add_watermarker": False},
    ),
}
"""Families that techniques can steer through Img2Img."""


def kinds_of(source: ModelSource) -> Kinds | None:
    """The pipelines of a model's family; None: it has none that take its techniques."""
    return _KINDS.get(type(source))


class Reconstructor:
    """A model whole, decoder and all, in diffusers' Img2Img pipelines.

    Args:
        source: a model that `kinds_of` has pipelines for.
        device: a torch device.
        compute_dtype: element type of the passes.

    Raises:
        BadRequestError: if a part is damaged.
        NotFoundError: if weights are missing.
    """

    def __init__(self, source: ModelSource, device: str, compute_dtype: str) -> None:
        import diffusers
        import torch
        import transformers

        from featstore.extraction.detectors import Detectors
        from featstore.models.adapters import Adapters
        from featstore.models.backbones.loading import (
            errors_about,
            freeze,
            pretrained,
            pretrained_text,
            torch_device,
            torch_dtype,
        )  # fmt: skip
        from featstore.models.ip_adapters import IPAdapters
        from featstore.models.quiet import quiet
        from featstore.models.tokens import load_tokenizer

        kinds = _KINDS[type(source)]
        self._source, self._kinds = source, kinds
        self._device, self._dtype = torch_device(device), torch_dtype(compute_dtype)
        folder, weights = source.folder, source.component_weights
        parts: dict[str, Any] = {}
        for name, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
            parts[name] = freeze(pretrained(kind, folder / name, weights[name], self._dtype), self._device)
        for name, text in kinds.text_encoders.items():
            model = pretrained_text(getattr(transformers, text), folder / name, weights[name], self._dtype)
            parts[name] = freeze(model, self._device)
            tokenizer = name.replace("text_encoder", "tokenizer")
            parts[tokenizer] = load_tokenizer(folder, tokenizer)
        with quiet(), errors_about(f"scheduler of {folder}"):
            config = source.component_folder("scheduler") / "scheduler_config.json"
            self.scheduler: str = read_json(config, f"model {source.name!r}")["_class_name"]
            """Name of the model's own scheduler."""
            scheduler = getattr(diffusers, self.scheduler)
            parts["scheduler"] = scheduler.from_pretrained(config.parent, local_files_only=True)
        self._parts = parts
        self._detectors = Detectors(self._device)
        self._controlnets: dict[str, Any] = {}
        adaptable = {name: parts[name] for name in ("unet", *kinds.text_encoders)}
        self._adapters = Adapters(adaptable)
        self._ip_adapters = IPAdapters(parts["unet"])
        self._diffusers, self._torch = diffusers, torch

    def run(
        self,
        steering: Steering,
        images: UInt8Array,
        seen: UInt8Array,
        texts: Sequence[str],
        seeds: Sequence[int],
        *,
        strength: float,
        steps: int,
    ) -> UInt8Array:
        """Pictures remade from noised ones.

        Args:
            steering: what acts.
            images: uint8 (B, H, W, 3), RGB, at a size that the model takes.
            seen: what ControlNets and IP-Adapters see, of the same shape.
            texts: prompt of each.
            seeds: of the noise of each; see `seed_of`.
            strength: share of the schedule that is undone, above 0 and at most 1.
            steps: of the whole schedule.

        Returns:
            uint8 (B, H, W, 3).
        """
        from featstore.models.quiet import quiet

        guidance = 1.0 if steering.guidance is None else steering.guidance
        # The pipelines repeat what an IP-Adapter saw for every row of a batch: rows with images of their own go alone.
        size = 1 if steering.ip_adapters else max(1, len(images))
        with quiet(), self._acting(steering), warnings.catch_warnings():
            # Of schedulers that hand tensors to numpy; nothing that whoever judges can do about.
            warnings.simplefilter("ignore", DeprecationWarning)
            pipeline = self._pipeline(steering)
            pipeline.set_progress_bar_config(disable=True)
            made = []
            for start in range(0, len(images), size):
                rows = slice(start, start + size)
                result = pipeline(
                    prompt=list(texts[rows]),
                    image=_unit(images[rows]),
                    strength=strength,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=[self._torch.Generator("cpu").manual_seed(seed) for seed in seeds[rows]],
                    output_type="np",
                    **self._conditions(steering, seen[rows]),
                    **self._looks(steering, seen[rows], guided=guidance > 1),
                )
                made.append(np.round(np.clip(result.images, 0, 1) * 255).astype(np.uint8))
        return np.concatenate(made)

    def latents(self, images: UInt8Array) -> npt.NDArray[np.float32]:
        """Means of the autoencoder's posterior for images uint8 (B, H, W, 3): float32 (B, C, h, w), not scaled."""
        from featstore.models.quiet import quiet

        torch, vae = self._torch, self._parts["vae"]
        before = vae.dtype
        with quiet():
            try:
                if before != torch.float32:
                    vae.to(torch.float32)  # some overflow in half precision
                with torch.inference_mode():
                    mean = vae.encode((_unit(images) * 2 - 1).to(self._device)).latent_dist.mean
            finally:
                if before != torch.float32:
                    vae.to(before)
        return np.asarray(mean.float().cpu(), dtype=np.float32)

    @contextlib.contextmanager
    def _acting(self, steering: Steering) -> Iterator[None]:
        """Context in which the steering's LoRAs and IP-Adapters act."""
        with contextlib.ExitStack() as stack:
            loras = [(self._adapters.load(ref.path, ref.digest), ref.scale) for ref in steering.loras]
            stack.enter_context(self._adapters.enabled(loras))
            for ref in steering.ip_adapters:
                self._ip_adapters.load(ref.path, ref.image_encoder, ref.digest)
                stack.enter_context(self._ip_adapters.acting(ref.digest, ref.scale))
            yield

    def _pipeline(self, steering: Steering) -> Any:
        kinds = self._kinds
        if not steering.controlnets:
            return getattr(self._diffusers, kinds.plain)(**self._parts, **kinds.options)
        networks = [self._controlnet(ref.folder, ref.digest) for ref in steering.controlnets]
        one_or_all = networks[0] if len(networks) == 1 else networks
        return getattr(self._diffusers, kinds.with_controlnet)(**self._parts, controlnet=one_or_all, **kinds.options)

    def _controlnet(self, folder: Path, digest: str) -> Any:
        from featstore.models.backbones.loading import freeze, pretrained
        from featstore.models.files import DIFFUSERS_STEM, weight_files

        if digest not in self._controlnets:
            weights = weight_files(folder, DIFFUSERS_STEM, allow_pickle=self._source.allow_pickle)
            model = pretrained(self._diffusers.ControlNetModel, folder, weights, self._dtype)
            self._controlnets[digest] = freeze(model, self._device)
        return self._controlnets[digest]

    def _conditions(self, steering: Steering, seen: UInt8Array) -> dict[str, Any]:
        if not steering.controlnets:
            return {}
        images = [
            _unit(np.stack([self._detectors.see(image, ref.detector) for image in seen]))
            for ref in steering.controlnets
        ]
        scales = [ref.scale for ref in steering.controlnets]
        several = len(images) > 1
        return {
            "control_image": images if several else images[0],
            "controlnet_conditioning_scale": scales if several else scales[0],
        }

    def _looks(self, steering: Steering, seen: UInt8Array, *, guided: bool) -> dict[str, Any]:
        if not steering.ip_adapters:
            return {}
        torch = self._torch
        found = []
        for ref in steering.ip_adapters:
            embeds = torch.cat([self._ip_adapters.see(ref.digest, image) for image in seen])
            if guided:
                nothing = self._ip_adapters.see(ref.digest, None).expand_as(embeds)
                embeds = torch.cat([nothing, embeds])
            found.append(embeds)
        return {"ip_adapter_image_embeds": found}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._adapters.clear()
        self._ip_adapters.clear()
        self._controlnets.clear()
        self._parts.clear()
        gc.collect()
        if self._device.type == "cuda":
            self._torch.cuda.empty_cache()


def seed_of(seed: int, digest: str) -> int:
    """Seed of one image's noise, the same for all techniques."""
    words = hashlib.sha256(f"featstore gate|{seed}|{digest}".encode()).digest()
    return int.from_bytes(words[:7], "big")


def _unit(images: UInt8Array) -> Any:
    """Pixels as torch float32 (B, 3, H, W) in [0, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255

"""How features are extracted without featstore, for comparison: stock pipelines, batch 1, a file a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import ControlNetModel, DDPMScheduler, StableDiffusionPipeline
from PIL import Image

from featstore.models.layers import Read, Tap
from featstore.models.quiet import quiet
from featstore.pipelines.plan import Plan, PlannedRun


class CommonWay:
    """Eager diffusers, one technique after another, image by image: encode, noise, one pass, ``.cpu()``, ``np.save``.

    Hooks read the same layers as the plan's; attention probabilities are formed from queries and keys of all heads.
    Texts are encoded once a technique and edges are those of ``cv2.Canny``, as careful scripts do it.

    Args:
        plan: what is to be extracted; images are read from its data set.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._device = torch.device(plan.device)
        self._dtype = torch.float32 if plan.device == "cpu" else torch.float16
        with quiet():
            self._pipelines = [self._pipeline(run) for run in plan.runs]
            self._nets = [[self._net(ref.folder) for ref in run.steering.controlnets] for run in plan.runs]
            self._noise = DDPMScheduler.from_config(self._pipelines[0].scheduler.config)

    def __call__(self, folder: Path) -> None:
        """Extract everything into ``folder``, a file an image, technique and layer."""
        for place, (run, pipeline, nets) in enumerate(zip(self._plan.runs, self._pipelines, self._nets, strict=True)):
            self._technique(run, pipeline, nets, folder, f"{place}")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _pipeline(self, run: PlannedRun) -> Any:
        pipeline = StableDiffusionPipeline.from_pretrained(
            self._plan.source.folder, safety_checker=None, requires_safety_checker=False
        ).to(self._device, self._dtype)
        for ref in run.steering.loras:
            pipeline.load_lora_weights(str(ref.path.parent), weight_name=ref.path.name)
        return pipeline

    def _net(self, folder: Path) -> Any:
        return ControlNetModel.from_pretrained(folder).to(self._device, self._dtype)

    @torch.no_grad()
    def _technique(self, run: PlannedRun, pipeline: Any, nets: list[Any], folder: Path, name: str) -> None:
        recipe, dataset = run.recipe, self._plan.dataset
        text = pipeline.encode_prompt(run.steering.prompt, self._device, 1, do_classifier_free_guidance=False)[0]
        step = torch.tensor([recipe.timestep], device=self._device)
        for index in self._plan.wanted:
            key = dataset.samples[index].key
            image = Image.fromarray(dataset.image(key)).resize((recipe.width_px, recipe.height_px))
            pixels = pipeline.image_processor.preprocess(image).to(self._device, self._dtype)
            latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
            noised = self._noise.add_noise(latents, torch.randn_like(latents), step)
            extra: dict[str, Any] = {}
            for net in nets:
                edges = torch.from_numpy(cv2.Canny(np.asarray(image), 100, 200))[None, None].expand(1, 3, -1, -1) / 255
                down, middle = net(noised, step, text, edges.to(self._device, self._dtype), return_dict=False)
                extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            with _Hooks(pipeline.unet, [self._plan.source.taps[layer] for layer in run.layers]) as hooks:
                pipeline.unet(noised, step, encoder_hidden_states=text, **extra)
            for layer, value in hooks.maps().items():
                np.save(folder / f"{name}-{key.replace('/', '_')}-{layer}.npy", value.to(torch.float16).cpu().numpy())


class _Hooks:
    """Forward hooks that keep outputs, and queries and keys of attention, until they are asked for."""

    def __init__(self, unet: Any, taps: list[Tap]) -> None:
        self._unet = unet
        self._taps = taps
        self._handles: list[Any] = []
        self._outputs: dict[str, torch.Tensor] = {}

    def __enter__(self) -> _Hooks:
        for tap in self._taps:
            for name in tap.modules:
                kept = [f"{name}.to_q", f"{name}.to_k"] if tap.read is Read.ATTENTION else [name]
                for module in kept:
                    self._handles.append(self._unet.get_submodule(module).register_forward_hook(self._keep(module)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            self._outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def maps(self) -> dict[str, torch.Tensor]:
        """(1, C, H, W) of each layer."""
        return {tap.layer: self._map(tap) for tap in self._taps}

    def _map(self, tap: Tap) -> torch.Tensor:
        if tap.read is not Read.ATTENTION:
            return self._outputs[tap.modules[0]]
        probabilities = []
        for name in tap.modules:
            attention = self._unet.get_submodule(name)
            query, key = (attention.head_to_batch_dim(self._outputs[f"{name}.{part}"]) for part in ("to_q", "to_k"))
            probabilities.append(attention.get_attention_scores(query, key).mean(0).T)
        mean = torch.stack(probabilities).mean(0)
        # The model's input is square here.
        return mean.reshape(1, len(mean), round(mean.shape[1] ** 0.5), -1)

"""Every layer of Stable Diffusion XL and 2.1, under techniques, against a forward pass written out by hand.

The expected side imports nothing of featstore: texts come from diffusers' own pipelines, ControlNets are stock ones
called here, and every layer is computed by `handwritten.forward`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, DDPMScheduler
from diffusers.pipelines.controlnet.pipeline_controlnet_sd_xl import StableDiffusionXLControlNetPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

from featstore.extraction.forward import Extractor
from featstore.models.families import open_folder
from featstore.models.source import ModelSource
from featstore.techniques import parse, resolve
from tests.extraction.test_exactness import load_handwritten, philox, pictures, with_loras
from tests.tiny_models import TextDataset, build_tiny_controlnet, build_tiny_lora
from tests.tiny_sdxl import build_tiny_sd21, build_tiny_sdxl, build_tiny_sdxl_lora

TIMESTEP, SEED, GUIDANCE = 301, 4, 7.5
SIZE = (64, 96)
TECHNIQUES = "basic,prompt,prompt:caption,controlnet,lora,cfg,controlnet:canny+lora+prompt"
CAPTIONS = ["a horse 1", "a fine horse", "x"]
Maps = dict[str, torch.Tensor]


def images_and_digests() -> tuple[np.ndarray, list[str]]:
    images = pictures(3, *SIZE)
    return images, [hashlib.sha256(image.tobytes()).hexdigest() for image in images]


def source_in(root: Path) -> ModelSource:
    return open_folder(
        "m", root / "pipeline", controlnets={"canny": root / "controlnet"}, loras={("toyhorse", None): root / "lora"}
    )


def extractor_of(source: ModelSource, techniques: str) -> Extractor:
    steerings = [resolve(t, dataset=TextDataset(), model=source) for t in parse(techniques)]
    layers = source.expand_layers(",".join(source.taps))
    return Extractor(
        source.load(), steerings, layers, batch_size=2, height_px=SIZE[0], width_px=SIZE[1], precision="float32"
    )


def run(extractor: Extractor, expression: str, **options: Any) -> tuple[dict[str, np.ndarray], list[str]]:
    """Maps of three images, and the text of each."""
    images, digests = images_and_digests()
    index = [s.expression for s in extractor.steerings].index(expression)
    found, bad = extractor.run(index, extractor.encode(images), images, digests, TIMESTEP, SEED, CAPTIONS, **options)
    assert bad == {}
    text = extractor.steerings[index].prompt
    return found, CAPTIONS if text is None else [text] * 3


def assert_close(found: dict[str, np.ndarray], wanted: Maps, source: ModelSource) -> None:
    shapes = source.layer_names(*SIZE)
    assert set(found) == set(wanted) == set(shapes)
    for layer, value in wanted.items():
        assert found[layer].shape == (3, *shapes[layer]), layer
        for row in range(3):
            difference = np.linalg.norm(found[layer][row] - value[row].numpy()) / value[row].norm().item()
            assert difference < 1e-4, (layer, row, difference)


def noised_latents(pipeline: Any, timestep: int) -> torch.Tensor:
    images, digests = images_and_digests()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0 * 2 - 1
    latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noise = torch.stack([philox(SEED, digest, timestep, tuple(latents.shape[1:])) for digest in digests])
    return scheduler.add_noise(latents, noise, torch.full((3,), timestep))


def control(root: Path, noised: torch.Tensor, timestep: int, text: torch.Tensor, **more: Any) -> dict[str, Any]:
    model = ControlNetModel.from_pretrained(root / "controlnet", use_safetensors=True).eval()
    edges = np.stack([cv2.Canny(image, 100, 200) for image in images_and_digests()[0]])
    hint = torch.from_numpy(edges).float()[:, None].expand(-1, 3, -1, -1) / 255
    down, mid = model(noised, timestep, text, hint, return_dict=False, **more)
    return {"down_residuals": list(down), "mid_residual": mid}


# Stable Diffusion XL


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sdxl")
    build_tiny_sdxl(root / "pipeline")
    build_tiny_controlnet(root / "controlnet", root / "pipeline")
    build_tiny_sdxl_lora(root / "lora", root / "pipeline")
    return root


@pytest.fixture(scope="module")
def xl_extractor(xl: Path) -> Iterator[Extractor]:
    extractor = extractor_of(source_in(xl), TECHNIQUES)
    with extractor.backbone:
        yield extractor


@torch.no_grad()
def expected_xl(root: Path, technique: str, texts: list[str]) -> Maps:
    pipeline = StableDiffusionXLPipeline.from_pretrained(root / "pipeline", add_watermarker=False)
    unet = pipeline.unet
    # What diffusers calls the dimension of a head is the number of heads.
    assert [unet.up_blocks[i].attentions[0].transformer_blocks[0].attn2.heads for i in (0, 1)] == [4, 2]
    for name in ("unet", "text_encoder", "text_encoder_2"):
        with_loras(getattr(pipeline, name), name, [root / "lora"] if "lora" in technique.split("+") else [])
    text, no_text, pooled, no_pooled = pipeline.encode_prompt(texts, device="cpu")
    sizes = [*SIZE, 0, 0, *SIZE]
    noised = noised_latents(pipeline, TIMESTEP)
    more: dict[str, Any] = {}
    if "controlnet" in technique:
        added = {"text_embeds": pooled, "time_ids": torch.tensor([sizes]).repeat(3, 1)}
        more = control(root, noised, TIMESTEP, text, added_cond_kwargs=added)
    hand = load_handwritten()
    maps: Maps = hand.forward(unet, noised, TIMESTEP, text, pooled=pooled, sizes=sizes, **more)
    if technique != "cfg":
        return maps
    plain: Maps = hand.forward(unet, noised, TIMESTEP, no_text, pooled=no_pooled, sizes=sizes)
    return {
        layer: value
        if layer.endswith("-map") or layer.startswith("attn-")
        else plain[layer] + GUIDANCE * (value - plain[layer])
        for layer, value in maps.items()
    }


@pytest.mark.parametrize("expression", TECHNIQUES.split(","))
def test_every_layer_of_every_technique_of_sdxl(xl_extractor: Extractor, xl: Path, expression: str) -> None:
    found, texts = run(xl_extractor, expression)
    assert_close(found, expected_xl(xl, expression, texts), xl_extractor.backbone.source)


class Calls:
    """Keyword arguments with which a module is called, positional ones under their names."""

    def __init__(self, module: torch.nn.Module, *names: str) -> None:
        self.made: list[dict[str, Any]] = []

        def hook(_: object, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.made.append(dict(zip(names, arguments, strict=False)) | keywords)

        self._handle = module.register_forward_pre_hook(hook, with_kwargs=True)

    def one(self) -> dict[str, Any]:
        self._handle.remove()
        assert len(self.made) == 1
        return self.made[0]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_unet_and_a_controlnet_are_fed_what_diffusers_own_pipelines_feed_them(xl: Path) -> None:
    """The pipelines are told a prompt and a size, and nothing more; their first call is compared."""
    extractor = extractor_of(source_in(xl), "prompt,controlnet+prompt")
    backbone, steering = extractor.backbone, extractor.steerings[1]
    (ref,) = steering.controlnets
    model = ControlNetModel.from_pretrained(xl / "controlnet", use_safetensors=True)
    pipelines = [
        StableDiffusionXLPipeline.from_pretrained(xl / "pipeline", add_watermarker=False),
        StableDiffusionXLControlNetPipeline.from_pretrained(xl / "pipeline", controlnet=model, add_watermarker=False),
    ]
    options = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 1, "guidance_scale": 1.0}
    names = ("sample", "timestep")
    for expression, pipeline in zip(("prompt", "controlnet+prompt"), pipelines, strict=True):
        steered = pipeline is pipelines[1]
        theirs, ours = Calls(pipeline.unet, *names), Calls(backbone.denoiser, *names)
        if steered:
            their_control = Calls(pipeline.controlnet, *names)
            our_control = Calls(backbone.controlnet(ref.folder, ref.digest), *names)
            options["image"] = torch.zeros(1, 3, *SIZE)
        pipeline.set_progress_bar_config(disable=True)
        pipeline(steering.prompt, output_type="latent", **options)
        images, digests = images_and_digests()
        extractor.run(int(steered), extractor.encode(images[:2]), images[:2], digests[:2], TIMESTEP, SEED)
        pairs = [(theirs.one(), ours.one())]
        if steered:
            pairs.append((their_control.one(), our_control.one()))
        for their, our in pairs:
            for name in ("text_embeds", "time_ids"):
                value = our["added_cond_kwargs"][name]
                assert value.dtype == their["added_cond_kwargs"][name].dtype, (expression, name)
                torch.testing.assert_close(value, their["added_cond_kwargs"][name].expand_as(value), rtol=0, atol=0)
            text = our["encoder_hidden_states"]
            torch.testing.assert_close(text, their["encoder_hidden_states"].expand_as(text), rtol=0, atol=0)
            assert our["timestep"].tolist() == [TIMESTEP] * 2
            assert our.get("cross_attention_kwargs") == their.get("cross_attention_kwargs")
    extractor.backbone.close()


# Stable Diffusion 2.1


@pytest.fixture(scope="module")
def sd21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sd21")
    build_tiny_sd21(root / "pipeline")
    build_tiny_controlnet(root / "controlnet", root / "pipeline")
    build_tiny_lora(root / "lora", root / "pipeline")
    return root


@torch.no_grad()
@pytest.mark.parametrize("expression", ["basic", "controlnet+lora+prompt"])
@pytest.mark.parametrize("denoise_from", [None, TIMESTEP + 2])
def test_every_layer_of_a_model_that_predicts_v(sd21: Path, expression: str, denoise_from: int | None) -> None:
    extractor = extractor_of(source_in(sd21), expression)
    found, texts = run(extractor, expression, denoise_from=denoise_from)
    pipeline = StableDiffusionPipeline.from_pretrained(sd21 / "pipeline", safety_checker=None)
    unet = pipeline.unet
    assert [block.attentions[0].transformer_blocks[0].attn1.heads for block in unet.down_blocks[:3]] == [1, 2, 4]
    for name in ("unet", "text_encoder"):
        with_loras(getattr(pipeline, name), name, [sd21 / "lora"] if "lora" in expression else [])
    text, _ = pipeline.encode_prompt(texts, "cpu", 1, False)
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    assert ddim.config.prediction_type == "v_prediction"
    ddim.set_timesteps(1000)
    noised = noised_latents(pipeline, denoise_from or TIMESTEP)
    hand = load_handwritten()
    for timestep in range(denoise_from or TIMESTEP, TIMESTEP - 1, -1):
        more = control(sd21, noised, timestep, text) if "controlnet" in expression else {}
        maps: Maps = hand.forward(unet, noised, timestep, text, **more)
        if timestep > TIMESTEP:
            noised = ddim.step(maps["unet-out"], timestep, noised, eta=0.0).prev_sample
    assert_close(found, maps, extractor.backbone.source)
    extractor.backbone.close()

"""PixArt and Stable Diffusion 3: every layer against a forward pass written out by hand, and inputs against pipelines.

The expected side imports nothing of featstore: texts are encoded by diffusers' own pipelines, latents noised by its
schedulers, and layers computed by `handwritten_transformers`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler

from featstore import models
from featstore.extraction.forward import Extractor
from featstore.techniques import SteeringOptions, parse, resolve
from tests.extraction import handwritten_transformers
from tests.tiny_models import TextDataset
from tests.tiny_transformers import PIXARTS, SD3S, build_tiny_pixart, build_tiny_sd3, build_tiny_sd3_lora

TIMESTEP, SEED, GUIDANCE = 301, 4, 3.0
SIZE = (48, 64)
KINDS = (*PIXARTS, *SD3S)
PLAIN, DETAILED = "a horse", " A Horse, high quality"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("transformers")
    builders = dict.fromkeys(PIXARTS, build_tiny_pixart) | dict.fromkeys(SD3S, build_tiny_sd3)
    return {kind: build(root / kind, kind) for kind, build in builders.items()}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipeline(folders: dict[str, Path], kind: str) -> Any:
    none = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3-no-t5" else {}
    loaded = diffusers.DiffusionPipeline.from_pretrained(folders[kind], **none)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def extractor(folders: dict[str, Path], kind: str) -> Iterator[Extractor]:
    source = models.resolve(str(folders[kind]))
    options = SteeringOptions(guidance_scale=GUIDANCE)
    dataset = TextDataset(prompt=DETAILED)
    steerings = [resolve(t, dataset=dataset, model=source, options=options) for t in parse("basic,prompt,prompt+cfg")]
    with source.load() as backbone:
        yield Extractor(
            backbone,
            steerings,
            source.expand_layers(",".join(source.taps)),
            batch_size=2,
            height_px=SIZE[0],
            width_px=SIZE[1],
            precision="float32",
        )


def philox(seed: int, digest: str, timestep: int, shape: tuple[int, ...]) -> torch.Tensor:
    key = int(hashlib.sha256(f"featstore noise|{seed}|{digest}|{timestep}".encode()).hexdigest()[:32], 16)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32))


def pictures(count: int) -> np.ndarray:
    coarse = np.random.default_rng(1).integers(0, 256, (count, *(side // 8 for side in SIZE), 3))
    return np.kron(coarse, np.ones((1, 8, 8, 1))).astype(np.uint8)


def digests(images: np.ndarray) -> list[str]:
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images]


def schedule(kind: str) -> Any:
    """Diffusers' own: for SD3 with a shift of 1, so that timesteps are 1000 sigma."""
    if kind in SD3S:
        return FlowMatchEulerDiscreteScheduler(shift=1.0)
    return DDIMScheduler(
        beta_schedule="linear", beta_start=0.0001, beta_end=0.02, clip_sample=False, set_alpha_to_one=False
    )


def add_noise(kind: str, latents: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
    if kind in SD3S:
        return schedule(kind).scale_noise(latents, torch.full((len(latents),), float(timestep)), noise)
    return schedule(kind).add_noise(latents, noise, torch.full((len(latents),), timestep))


def noised(pipeline: Any, kind: str, images: np.ndarray, timestep: int = TIMESTEP) -> torch.Tensor:
    vae: AutoencoderKL = pipeline.vae
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0 * 2 - 1
    latents = (vae.encode(pixels).latent_dist.mode() - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    noise = torch.stack([philox(SEED, digest, timestep, tuple(latents.shape[1:])) for digest in digests(images)])
    return add_noise(kind, latents, noise, timestep)


def forward(pipeline: Any, kind: str, x: torch.Tensor, text: str) -> dict[str, torch.Tensor]:
    if kind in SD3S:
        words, _, pooled, _ = pipeline.encode_prompt(text, None, None, do_classifier_free_guidance=False)
        words, pooled = words.expand(len(x), -1, -1), pooled.expand(len(x), -1)
        return handwritten_transformers.sd3(pipeline.transformer, x, TIMESTEP, words, pooled)
    words, mask, _, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False)
    words, mask = words.expand(len(x), -1, -1), mask.expand(len(x), -1)
    return handwritten_transformers.pixart(pipeline.transformer, x, TIMESTEP, words, mask, SIZE)


@torch.no_grad()
@pytest.mark.parametrize("expression", ["basic", "prompt+cfg"])
def test_every_layer(extractor: Extractor, pipeline: Any, kind: str, expression: str) -> None:
    images = pictures(3)
    index = [steering.expression for steering in extractor.steerings].index(expression)
    found, bad = extractor.run(index, extractor.encode(images), images, digests(images), TIMESTEP, SEED)
    assert bad == {}
    x = noised(pipeline, kind, images)
    wanted = forward(pipeline, kind, x, PLAIN if expression == "basic" else DETAILED)
    if expression == "prompt+cfg":
        without = forward(pipeline, kind, x, "")
        for layer, value in wanted.items():
            if not layer.endswith("-map") and not layer.startswith("attn-"):
                wanted[layer] = without[layer] + GUIDANCE * (value - without[layer])
    shapes = extractor.backbone.source.layer_names(*SIZE)
    assert set(found) == set(wanted) == set(shapes)
    for layer, value in wanted.items():
        assert found[layer].shape == (3, *shapes[layer]), layer
        for row in range(3):
            difference = np.linalg.norm(found[layer][row] - value[row].numpy()) / value[row].norm().item()
            assert difference < 1e-4, (layer, row, difference)


@torch.no_grad()
# diffusers' DPMSolver and numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_transformer_is_fed_what_the_pipeline_feeds_it(extractor: Extractor, pipeline: Any, kind: str) -> None:
    fed: list[dict[str, Any]] = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _, __, named: fed.append(named),
        with_kwargs=True,
    )
    height, width = SIZE
    options: dict[str, Any] = {"guidance_scale": 1.0, "height": height, "width": width, "output_type": "latent"}
    if kind in PIXARTS:
        options |= {"use_resolution_binning": False, "clean_caption": False}
    pipeline(DETAILED, num_inference_steps=2, generator=torch.Generator().manual_seed(0), **options)
    handle.remove()
    theirs = fed[0]
    backbone = extractor.backbone
    x = torch.zeros(1, backbone.source.latent_channels, height // 4, width // 4)
    ours = backbone.inputs(x, torch.tensor([999]), backbone.encode_text(DETAILED), height, width)
    names = {"encoder_hidden_states", *(("pooled_projections",) if kind in SD3S else ("encoder_attention_mask",))}
    assert set(ours) == {"hidden_states", "timestep", *names, *(() if kind in SD3S else ("added_cond_kwargs",))}
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert ours["timestep"].shape == theirs["timestep"].shape
    if kind == "alpha-sized":
        for name in ("resolution", "aspect_ratio"):
            torch.testing.assert_close(ours["added_cond_kwargs"][name], theirs["added_cond_kwargs"][name])
    elif kind in PIXARTS:
        assert ours["added_cond_kwargs"] == theirs["added_cond_kwargs"] == {"resolution": None, "aspect_ratio": None}


@torch.no_grad()
def test_noise_and_steps_back_are_the_schedulers(extractor: Extractor, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    channels = extractor.backbone.source.latent_channels
    clean, noise, velocity = torch.randn(3, 2, channels, 6, 8, generator=generator)
    for timestep in (1, TIMESTEP, 999):
        ours = extractor.backbone.noised(clean, noise, timestep)
        torch.testing.assert_close(ours, add_noise(kind, clean, noise, timestep), rtol=1e-5, atol=1e-5)
    # PixArt's transformers may predict a variance beside the noise.
    prediction = extractor.backbone.prediction((torch.cat([velocity, torch.full_like(velocity, 9.0)], 1),))
    scheduler = schedule(kind)
    if kind in SD3S:
        scheduler.set_timesteps(sigmas=[0.301, 0.251])
    else:
        scheduler.set_timesteps(20)
    wanted = scheduler.step(velocity, scheduler.timesteps[0] if kind in SD3S else TIMESTEP, clean).prev_sample
    torch.testing.assert_close(extractor.backbone.stepped(clean, prediction, 301, 251), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_denoising_first(extractor: Extractor, pipeline: Any, kind: str) -> None:
    images = pictures(2)
    latents = extractor.encode(images)
    found, _ = extractor.run(1, latents, images, digests(images), 300, SEED, denoise_from=301)
    x, size = noised(pipeline, kind, images), torch.tensor([SIZE])
    if kind in SD3S:
        words, _, pooled, _ = pipeline.encode_prompt(DETAILED, None, None, do_classifier_free_guidance=False)
        named = {"encoder_hidden_states": words, "pooled_projections": pooled}
    else:
        words, mask, _, _ = pipeline.encode_prompt(DETAILED, do_classifier_free_guidance=False)
        added = {"resolution": size.float(), "aspect_ratio": size[:, :1] / size[:, 1:]}
        named = {"encoder_hidden_states": words, "encoder_attention_mask": mask, "added_cond_kwargs": added}
    rows = [pipeline.transformer(x[i : i + 1], timestep=torch.tensor([301]), **named).sample for i in range(2)]
    predicted = torch.cat(rows)[:, : x.shape[1]]
    if kind in SD3S:
        x = x - 0.001 * predicted
    else:
        now, then = (schedule(kind).alphas_cumprod[t] for t in (301, 300))
        x = (x - (1 - now).sqrt() * predicted) / now.sqrt() * then.sqrt() + (1 - then).sqrt() * predicted
    torch.testing.assert_close(torch.from_numpy(found["latent-in"]), x, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_texts_that_do_not_fit_are_cut_as_by_the_pipeline(
    extractor: Extractor, pipeline: Any, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    text = "a horse, " * 200 + "zzz"
    with caplog.at_level(logging.WARNING, logger="featstore"):
        ours = extractor.backbone.encode_text(text)["encoder_hidden_states"]
    assert any("zzz" in record.getMessage() for record in caplog.records)
    more = (None, None) if kind in SD3S else ()
    theirs = pipeline.encode_prompt(text, *more, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_lora_of_the_transformer_and_a_text_encoder(folders: dict[str, Path], tmp_path: Path) -> None:
    build_tiny_sd3_lora(tmp_path, folders["sd3"])
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folders["sd3"])
    pipeline.load_lora_weights(tmp_path, adapter_name="one")
    pipeline.set_adapters(["one"], [0.5])
    images = pictures(2)
    wanted = forward(pipeline, "sd3", noised(pipeline, "sd3", images), PLAIN)
    source = models.resolve(str(folders["sd3"]))
    options = SteeringOptions(lora_scale=0.5)
    steerings = [
        resolve(t, dataset=TextDataset(), model=source, options=options) for t in parse(f"basic,lora:{tmp_path}")
    ]
    layers = [name for name in source.taps if name.endswith(("-out", "-q", "-map")) or name.startswith("attn-")]
    sizes = {"batch_size": 2, "height_px": SIZE[0], "width_px": SIZE[1]}
    with source.load() as backbone:
        extractor = Extractor(backbone, steerings, layers, precision="float32", **sizes)
        latents = extractor.encode(images)
        plain, found = (extractor.run(i, latents, images, digests(images), TIMESTEP, SEED)[0] for i in range(2))
    for layer in layers:
        value = wanted[layer].numpy()
        assert np.linalg.norm(found[layer] - value) < 1e-4 * np.linalg.norm(value), layer
    assert np.linalg.norm(plain["vit-block3-out"] - found["vit-block3-out"]) > 0.1 * np.linalg.norm(value)


@pytest.mark.parametrize("kind", ["alpha-sized", "sd3"], scope="function")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_near(folders: dict[str, Path], kind: str, dtype: str) -> None:
    images = pictures(2)
    source = models.resolve(str(folders[kind]))
    steerings = [resolve(t, dataset=TextDataset(), model=source) for t in parse("basic")]
    layers = ("vit-block1-out", "vit-block3-out", "attn-cross-2", "attn-self-2")
    results = []
    for precision in ("float32", dtype):
        with source.load("cpu", precision) as backbone:
            extractor = Extractor(backbone, steerings, layers, batch_size=2, height_px=SIZE[0], width_px=SIZE[1])
            results.append(extractor.run(0, extractor.encode(images), images, digests(images), TIMESTEP, SEED)[0])
    for layer in layers:
        whole, half = (result[layer].astype(np.float32) for result in results)
        assert 0 < np.linalg.norm(whole - half) < 0.1 * np.linalg.norm(whole), layer

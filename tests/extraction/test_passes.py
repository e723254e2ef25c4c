"""Guidance, denoising before the reading, ensembles of noise and shared batches, each against stock modules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from featstore import models
from featstore.errors import BadRequestError
from featstore.extraction.forward import Extractor
from featstore.extraction.passes import Pass, denoising
from featstore.models import ModelSource
from featstore.models.backbones.stable_diffusion import StableDiffusionBackbone
from featstore.techniques import SteeringOptions, parse, resolve
from tests.tiny_models import TextDataset

N = 3
SEED = 2
DIGESTS = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(N)]
LAYERS = ("unet-in", "up-level1-upsampler-out", "attn-up-cross-2", "unet-out")
SCALE = 4.0


@pytest.fixture(scope="module")
def source(weights_root: Path) -> ModelSource:
    return models.resolve("reference", weights_root=weights_root)


@pytest.fixture(scope="module")
def backbone(source: ModelSource) -> StableDiffusionBackbone:
    loaded = source.load()
    assert isinstance(loaded, StableDiffusionBackbone)
    return loaded


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    data = TextDataset()
    return np.stack([data.image(str(n)) for n in range(N)])


def make(backbone: StableDiffusionBackbone, text: str, *, batch_size: int = 4) -> Extractor:
    options = SteeringOptions(guidance_scale=SCALE)
    steerings = [resolve(t, dataset=TextDataset(), model=backbone.source, options=options) for t in parse(text)]
    return Extractor(backbone, steerings, LAYERS, batch_size=batch_size, height_px=64, width_px=64, precision="float32")


def plain(backbone: StableDiffusionBackbone, x: torch.Tensor, timestep: int, text: str) -> dict[str, torch.Tensor]:
    """Two layers of a stock UNet, read by plain hooks, and the explicit attention of one level."""
    unet = UNet2DConditionModel.from_pretrained(backbone.source.folder / "unet", use_safetensors=True).eval()
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, output: seen.__setitem__(name, output)

    unet.up_blocks[1].upsamplers[0].register_forward_hook(keep("up-level1-upsampler-out"))
    with torch.no_grad():
        words = backbone.encode_text(text)["encoder_hidden_states"].clone().expand(len(x), -1, -1)
        seen["unet-out"] = unet(x, timestep, words).sample
    return seen


def close(found: np.ndarray, expected: torch.Tensor) -> None:
    for a, b in zip(found, expected.numpy(), strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)


def test_guidance_leads_every_map_from_the_empty_text_to_the_prompt(
    backbone: StableDiffusionBackbone, images: np.ndarray
) -> None:
    one = make(backbone, "cfg+prompt,prompt")
    latents = one.encode(images)
    maps, _ = one.run(0, latents, images, DIGESTS, 301, SEED)
    x = torch.from_numpy(maps["unet-in"])
    guided, unguided = (plain(backbone, x, 301, text) for text in ("a horse, high quality", ""))
    for layer in ("up-level1-upsampler-out", "unet-out"):
        close(maps[layer], unguided[layer] + SCALE * (guided[layer] - unguided[layer]))
    # Probabilities stay those under the prompt.
    unsteered, _ = one.run(1, latents, images, DIGESTS, 301, SEED)
    assert np.array_equal(maps["attn-up-cross-2"], unsteered["attn-up-cross-2"])


def test_guided_noise_and_timestep_are_those_of_diffusers_pipeline(
    backbone: StableDiffusionBackbone, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        backbone.source.folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    given: list[tuple[torch.Tensor, int]] = []
    step = pipeline.scheduler.step

    def spy(output: torch.Tensor, timestep: torch.Tensor, *rest: object, **more: object) -> object:
        given.append((output.clone(), int(timestep)))
        return step(output, timestep, *rest, **more)

    monkeypatch.setattr(pipeline.scheduler, "step", spy)
    one = make(backbone, "cfg+prompt")
    pipeline.scheduler.set_timesteps(2)
    timestep = int(pipeline.scheduler.timesteps[0])
    maps, _ = one.run(0, one.encode(images), images, DIGESTS, timestep, SEED)
    pipeline(
        ["a horse, high quality"] * N, height=64, width=64, num_inference_steps=2, guidance_scale=SCALE,
        latents=torch.from_numpy(maps["unet-in"]), output_type="latent",
    )  # fmt: skip
    noise, fed = given[0]
    assert fed == timestep
    close(maps["unet-out"], noise)


def test_denoising_is_ddim_down_to_the_timestep_that_is_read(
    backbone: StableDiffusionBackbone, images: np.ndarray
) -> None:
    assert denoising(61, 50) == tuple(range(61, 49, -1))
    assert denoising(301, 150) == (*range(301, 150, -10), 150)
    one = make(backbone, "basic")
    latents = one.encode(images)
    start, _ = one.run(0, latents, images, DIGESTS, 61, SEED)
    maps, _ = one.run(0, latents, images, DIGESTS, 50, SEED, denoise_from=61)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(1000)
    x = torch.from_numpy(start["unet-in"])
    for timestep in range(61, 50, -1):
        x = scheduler.step(plain(backbone, x, timestep, "a horse")["unet-out"], timestep, x).prev_sample
    close(maps["unet-in"], x)
    close(maps["unet-out"], plain(backbone, x, 50, "a horse")["unet-out"])


def test_denoising_under_guidance_follows_the_guided_noise(
    backbone: StableDiffusionBackbone, images: np.ndarray
) -> None:
    one = make(backbone, "cfg")
    latents = one.encode(images)
    start, _ = one.run(0, latents, images, DIGESTS, 51, SEED)
    maps, _ = one.run(0, latents, images, DIGESTS, 50, SEED, denoise_from=51)
    alphas = backbone.schedule.alphas_cumprod
    x, noise = torch.from_numpy(start["unet-in"]), torch.from_numpy(start["unet-out"])
    clean = (x - (1 - alphas[51]).sqrt() * noise) / alphas[51].sqrt()
    close(maps["unet-in"], alphas[50].sqrt() * clean + (1 - alphas[50]).sqrt() * noise)


def test_an_ensemble_is_the_mean_over_its_draws_whatever_the_batches(
    backbone: StableDiffusionBackbone, images: np.ndarray
) -> None:
    one = make(backbone, "basic")
    latents = one.encode(images)
    whole, _ = one.run(0, latents, images, DIGESTS, 301, SEED, noise_ensemble=3)
    single, _ = one.run(0, latents, images, DIGESTS, 301, SEED)
    alpha = float(backbone.schedule.alphas_cumprod[301])
    total = torch.zeros(N, 4, 16, 16)
    for draw in range(3):
        rows = []
        for digest in DIGESTS:
            words = f"featstore noise|{SEED}|{digest}|301" + (f"|{draw}" if draw else "")
            key = int(hashlib.sha256(words.encode()).hexdigest()[:32], 16)
            rows.append(np.random.Generator(np.random.Philox(key=key)).standard_normal((4, 16, 16), dtype=np.float32))
        x = alpha**0.5 * latents + (1 - alpha) ** 0.5 * torch.from_numpy(np.stack(rows))
        if draw == 0:
            close(single["unet-in"], x)
        total += plain(backbone, x, 301, "a horse")["unet-out"]
    close(whole["unet-out"], total / 3)
    alone, _ = one.run(0, latents[2:], images[2:], DIGESTS[2:], 301, SEED, noise_ensemble=3)
    assert all(np.array_equal(alone[layer][0], whole[layer][2]) for layer in LAYERS)


def test_passes_of_the_same_modules_share_batches_and_give_the_same_bytes(
    backbone: StableDiffusionBackbone, images: np.ndarray
) -> None:
    one = make(backbone, "basic,prompt,lora,controlnet", batch_size=6)
    latents, rows = one.encode(images), np.arange(N)
    passes = [
        Pass(steering=0, rows=rows, timestep=50, seed=SEED),
        Pass(steering=2, rows=rows, timestep=50, seed=SEED),
        Pass(steering=1, rows=rows[1:], timestep=50, seed=SEED),
        Pass(steering=0, rows=rows[:1], timestep=301, seed=SEED, noise_ensemble=2),
        Pass(steering=3, rows=rows, timestep=50, seed=SEED),
    ]
    alone = [
        one.run(
            p.steering, latents[p.rows], images[p.rows], [DIGESTS[r] for r in p.rows], p.timestep, SEED,
            noise_ensemble=p.noise_ensemble,
        )[0]
        for p in passes
    ]  # fmt: skip
    calls: list[tuple[int, ...]] = []
    handle = backbone.unet.conv_in.register_forward_pre_hook(lambda _, given: calls.append(tuple(given[0].shape)))
    try:
        together = {index: maps.wait()[0] for index, maps in one.run_all(latents, images, DIGESTS, passes)}
    finally:
        handle.remove()
    # basic at 50, prompt, and basic at 301 twice: seven rows in two batches; LoRA and ControlNet one each.
    assert calls == [(6, 4, 16, 16)] * 4
    assert sorted(together) == list(range(5))
    for index, maps in together.items():
        assert all(np.array_equal(maps[layer], alone[index][layer]) for layer in LAYERS), index


def test_passes_that_cannot_be(backbone: StableDiffusionBackbone, images: np.ndarray) -> None:
    one = make(backbone, "basic")
    latents = one.encode(images)
    for changes, message in (
        ({"timestep": 1000}, "timestep 1000 is outside 0..999"),
        ({"denoise_from": 50}, "denoising from timestep 50 is outside 51..999"),
        ({"denoise_from": 1000}, "denoising from timestep 1000"),
        ({"noise_ensemble": 0}, "noise ensemble of 0"),
        ({"captions": ["a"]}, "1 captions for 3 rows"),
        ({"rows": np.arange(0)}, "no rows"),
    ):
        given = Pass(**({"steering": 0, "rows": np.arange(N), "timestep": 50} | changes))  # type: ignore[arg-type]
        with pytest.raises(BadRequestError, match=message):
            next(one.run_all(latents, images, DIGESTS, [given]))

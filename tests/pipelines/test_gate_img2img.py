"""Remade pictures: against diffusers' pipelines, loaded and steered in diffusers' own ways."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

import featstore.models
import featstore.techniques
from featstore.datasets import resolve as dataset_of
from featstore.models.quiet import quiet
from featstore.pipelines.gate.img2img import Reconstructor, kinds_of, seed_of
from tests.tiny_ip_adapter import build_tiny_ip_adapter
from tests.tiny_models import build_tiny_controlnet
from tests.tiny_sdxl import build_tiny_sdxl

STRENGTH, STEPS, SEEDS = 0.75, 8, (3, 2**40)
TEXT = "a horse, high quality"


@pytest.fixture(scope="module")
def images():
    coarse = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((64, 64), Image.Resampling.BICUBIC)) for one in coarse])


@pytest.fixture
def eyes(weights_root, tmp_path):
    """File of a tiny IP-Adapter."""
    return build_tiny_ip_adapter(tmp_path / "ip", weights_root / "reference" / "pipeline")


@pytest.fixture
def steer(photos):
    """Resolves a technique expression for a model."""

    def resolve(source, expression):
        (technique,) = featstore.techniques.parse(expression)
        options = featstore.techniques.SteeringOptions(prompt=TEXT, guidance_scale=3.0)
        dataset = dataset_of(f"folder:{photos}")
        return featstore.techniques.resolve(technique, dataset=dataset, model=source, options=options)

    return resolve


def remade(source, steering, images, seen=None):
    with Reconstructor(source, "cpu", "float32") as model:
        return model.run(
            steering,
            images,
            images if seen is None else seen,
            [steering.prompt] * 2,
            SEEDS,
            strength=STRENGTH,
            steps=STEPS,
        )


def stock(pipeline, images, **options):
    """One image at a time, as PIL images, with generators of the same seeds."""
    found = []
    pipeline.set_progress_bar_config(disable=True)
    for index, seed in enumerate(SEEDS):
        own = {name: value(index) if callable(value) else value for name, value in options.items()}
        result = pipeline(
            image=Image.fromarray(images[index]),
            strength=STRENGTH,
            num_inference_steps=STEPS,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="pil",
            **({"guidance_scale": 1.0} | own),
        )
        found.append(np.asarray(result.images[0]))
    return np.stack(found)


def edges(image):
    return Image.fromarray(np.repeat(cv2.Canny(image, 100, 200)[..., None], 3, axis=2))


def close(ours, theirs):
    """Within the rounding of sums in another order, which differs with the batch."""
    assert ours.dtype == np.uint8
    return ours.shape == theirs.shape and np.abs(ours.astype(int) - theirs).max() <= 2


@pytest.fixture
def expected(weights_root, images, eyes, tmp_path):
    """What diffusers makes of the images under a technique, all parts loaded by its own loaders."""
    home = weights_root / "reference"
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def make(technique):
        with quiet():
            plain = StableDiffusionImg2ImgPipeline.from_pretrained(home / "pipeline", **none)
            if technique == "prompt":
                return stock(plain, images, prompt=TEXT)
            if technique == "cfg+prompt":
                return stock(plain, images, prompt=TEXT, guidance_scale=3.0)
            if technique == "controlnet+prompt":
                network = ControlNetModel.from_pretrained(home / "controlnet-canny")
                steered = StableDiffusionControlNetImg2ImgPipeline(**plain.components, controlnet=network)
                return stock(
                    steered, images, prompt=TEXT, control_image=lambda i: edges(images[i]),
                    controlnet_conditioning_scale=0.7,
                )  # fmt: skip
            if technique == "lora+prompt":
                plain.load_lora_weights(home / "lora", adapter_name="own")
                plain.set_adapters(["own"], adapter_weights=[0.6])
                plain.fuse_lora(components=["unet", "text_encoder"])
                return stock(plain, images, prompt=TEXT)
            plain.load_ip_adapter(
                str(eyes.parent), subfolder="", weight_name=eyes.name, image_encoder_folder="image_encoder"
            )
            plain.set_ip_adapter_scale(0.8)
            guidance = 3.0 if "cfg" in technique else 1.0
            return stock(
                plain,
                images,
                prompt=TEXT,
                guidance_scale=guidance,
                ip_adapter_image=lambda i: Image.fromarray(images[i]),
            )

    return make


@pytest.mark.parametrize(
    ("technique", "ours"),
    [
        ("prompt", "prompt"),
        ("cfg+prompt", "cfg+prompt"),
        ("controlnet+prompt", "controlnet@0.7+prompt"),
        ("lora+prompt", "lora:{lora}@0.6+prompt"),
        ("ip-adapter+prompt", "ip-adapter:{eyes}@0.8+prompt"),
        ("cfg+ip-adapter+prompt", "cfg+ip-adapter:{eyes}@0.8+prompt"),
    ],
)
def test_it_is_diffusers_own_img2img(weights_root, images, eyes, steer, expected, technique, ours):
    source = featstore.models.resolve("reference", weights_root=weights_root)
    expression = ours.format(lora=weights_root / "reference" / "lora", eyes=eyes)
    found = remade(source, steer(source, expression), images)
    assert close(found, expected(technique))
    if technique != "prompt":
        assert not close(found, expected("prompt"))


def test_nothing_that_acted_before_acts_after(weights_root, images, eyes, steer):
    source = featstore.models.resolve("reference", weights_root=weights_root)
    alone = remade(source, steer(source, "prompt"), images)
    lora = weights_root / "reference" / "lora"
    with Reconstructor(source, "cpu", "float32") as model:
        for expression in (f"lora:{lora}", f"ip-adapter:{eyes}", "controlnet", "prompt"):
            steering = steer(source, expression)
            found = model.run(steering, images, images, [TEXT] * 2, SEEDS, strength=STRENGTH, steps=STEPS)
            assert (found == alone).all() == (expression == "prompt")


def test_techniques_without_any_strength_change_nothing(weights_root, images, steer):
    source = featstore.models.resolve("reference", weights_root=weights_root)
    alone = remade(source, steer(source, "prompt"), images)
    lora = weights_root / "reference" / "lora"
    assert (remade(source, steer(source, f"lora:{lora}@0+prompt"), images) == alone).all()
    assert (remade(source, steer(source, "controlnet@0+prompt"), images) == alone).all()


def test_controlnets_see_what_they_are_shown_and_several_add_up(weights_root, images, steer, tmp_path):
    source = featstore.models.resolve("reference", weights_root=weights_root)
    own = remade(source, steer(source, "controlnet+prompt"), images)
    other = remade(source, steer(source, "controlnet+prompt"), images, seen=images[::-1])
    assert (own != other).any()
    second = build_tiny_controlnet(tmp_path / "second", weights_root / "reference" / "pipeline", seed=9)
    both = remade(source, steer(source, f"controlnet+controlnet:{second}@0+prompt"), images)
    assert close(both, own)
    assert not close(remade(source, steer(source, f"controlnet+controlnet:{second}+prompt"), images), own)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' Euler scheduler
@pytest.mark.parametrize("technique", ["prompt", "cfg+prompt", "controlnet+prompt"])
def test_of_sdxl_too(images, steer, tmp_path, technique):
    folder = build_tiny_sdxl(tmp_path / "sdxl")
    build_tiny_controlnet(folder / "controlnet-canny", folder)
    source = featstore.models.resolve(str(folder))
    assert kinds_of(source).plain == "StableDiffusionXLImg2ImgPipeline"
    found = remade(source, steer(source, technique), images)
    with quiet():
        pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, add_watermarker=False)
        options = {"prompt": TEXT, "guidance_scale": 3.0 if "cfg" in technique else 1.0}
        if "controlnet" in technique:
            network = ControlNetModel.from_pretrained(folder / "controlnet-canny")
            pipeline = StableDiffusionXLControlNetImg2ImgPipeline(
                **pipeline.components, controlnet=network, add_watermarker=False
            )
            options |= {"control_image": lambda index: edges(images[index]), "controlnet_conditioning_scale": 1.0}
        assert close(found, stock(pipeline, images, **options))


def test_latents_are_the_autoencoders(weights_root, images):
    source = featstore.models.resolve("reference", weights_root=weights_root)
    with Reconstructor(source, "cpu", "float32") as model:
        found = model.latents(images)
        config = json.loads((source.folder / "scheduler" / "scheduler_config.json").read_text())
        assert model.scheduler == config["_class_name"] == "PNDMScheduler"
    with source.load() as backbone:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        expected = backbone.encode_images(pixels) / backbone.latent_scale
    assert found.shape == (2, 4, 16, 16)
    assert np.abs(found - expected.numpy()).max() < 1e-5


def test_seeds_belong_to_images():
    assert seed_of(0, "a" * 64) == seed_of(0, "a" * 64)
    assert len({seed_of(seed, digest * 64) for seed in (0, 1) for digest in "ab"}) == 4
    torch.Generator("cpu").manual_seed(seed_of(0, "f" * 64))

"""The IP-Adapter that comes with `reference`: found by its name alone, and of use for the picture that it is shown."""

from __future__ import annotations

import numpy as np
import pytest

from featstore import datasets, models
from featstore.extraction.forward import Extractor
from featstore.models import ModelSource
from featstore.techniques import Steering, SteeringOptions, parse, resolve

N = 8
TIMESTEP = 500
TEXTS = ("prompt", "prompt+ip-adapter@0", "prompt+ip-adapter")
LAYERS = ("unet-in", "unet-out")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FEATSTORE_WEIGHTS", raising=False)
        patch.chdir(tmp_path_factory.mktemp("nowhere"))
        return models.resolve("reference")


def steer(text: str, source: ModelSource) -> Steering:
    (technique,) = parse(text)
    return resolve(technique, dataset=datasets.resolve("toyhorse"), model=source, options=SteeringOptions())


def test_it_is_found_by_its_name_alone(source: ModelSource) -> None:
    (found,) = steer("ip-adapter", source).ip_adapters
    weights = source.folder.parent
    assert found.path == weights / "ip-adapter" / "ip_adapter.safetensors"
    assert found.image_encoder == weights / "ip-adapter" / "image_encoder"
    assert source.own_parts["ip-adapter"] == ("its own",)
    assert source.own_parts["lora"] == ("toyhorse", "toyhorse:overfit")
    assert source.own_parts["controlnet"] == ("canny",)
    # All that ships fits into what a package may weigh.
    assert sum(file.stat().st_size for file in weights.rglob("*") if file.is_file()) <= 30_000_000


def test_a_picture_is_told_apart_better_by_its_own_view_than_by_anothers(source: ModelSource) -> None:
    data = datasets.resolve("toyhorse")
    samples = [sample for sample in data.samples if sample.split == "test"][:N]
    images = np.stack([data.image(sample.key) for sample in samples])
    digests = [sample.digest for sample in samples]
    with source.load() as backbone:
        one = Extractor(
            backbone, [steer(text, source) for text in TEXTS], LAYERS, batch_size=N, height_px=64, width_px=64,
            precision="float32",
        )  # fmt: skip
        latents = one.encode(images)
        others = np.roll(images, 1, axis=0)
        shown = {"none": (0, images), "scale 0": (1, images), "own": (2, images), "another's": (2, others)}
        maps = {name: one.run(index, latents, seen, digests, TIMESTEP, 0)[0] for name, (index, seen) in shown.items()}
    assert np.array_equal(maps["scale 0"]["unet-out"], maps["none"]["unet-out"])
    # DDPM's schedule as Stable Diffusion has it, written out.
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha = np.cumprod(1 - betas)[TIMESTEP]
    noise = (maps["none"]["unet-in"] - alpha**0.5 * np.asarray(latents)) / (1 - alpha) ** 0.5
    loss = {name: float(np.square(found["unet-out"] - noise).mean()) for name, found in maps.items()}
    assert loss["own"] < loss["none"]
    assert loss["own"] < loss["another's"]

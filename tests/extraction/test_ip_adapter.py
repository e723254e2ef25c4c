"""IP-Adapters against diffusers' own pipeline, and what is left when none acts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from featstore import models
from featstore.errors import BadRequestError, NotFoundError
from featstore.extraction.forward import Extractor
from featstore.models import ModelSource
from featstore.techniques import Steering, SteeringOptions, parse, resolve
from tests.tiny_ip_adapter import build_tiny_ip_adapter
from tests.tiny_models import TextDataset

N = 3
DIGESTS = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(N)]
LAYERS = ("unet-in", "up-level1-upsampler-out", "attn-up-cross-2", "unet-out")
GUIDANCE = 3.0


@pytest.fixture(scope="module")
def source(weights_root: Path) -> ModelSource:
    return models.resolve("reference", weights_root=weights_root)


@pytest.fixture(scope="module")
def adapter(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_ip_adapter(tmp_path_factory.mktemp("ip") / "adapter", source.folder)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    data = TextDataset()
    return np.stack([data.image(str(n)) for n in range(N)])


def steer(text: str, source: ModelSource, **options: float) -> Steering:
    (technique,) = parse(text)
    given = SteeringOptions(guidance_scale=GUIDANCE, **options)  # type: ignore[arg-type]
    return resolve(technique, dataset=TextDataset(), model=source, options=given)


def make(source: ModelSource, *texts: str, **options: float) -> Extractor:
    return Extractor(
        source.load(), [steer(text, source, **options) for text in texts], LAYERS, batch_size=2, height_px=64,
        width_px=64, precision="float32",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["", "cfg+"])
def test_guided_noise_is_that_of_diffusers_pipeline(
    source: ModelSource, adapter: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    one = make(source, f"{kind}ip-adapter:{adapter}@0.6+prompt")
    pipeline = StableDiffusionPipeline.from_pretrained(
        source.folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(adapter.parent / "image_encoder"),
    )  # fmt: skip
    pipeline.feature_extractor = CLIPImageProcessor.from_pretrained(adapter.parent / "image_encoder")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(0.6)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    given: list[torch.Tensor] = []
    step = pipeline.scheduler.step

    def spy(output: torch.Tensor, *rest: object, **more: object) -> object:
        given.append(output.clone())
        return step(output, *rest, **more)

    monkeypatch.setattr(pipeline.scheduler, "step", spy)
    pipeline.scheduler.set_timesteps(2)
    maps, _ = one.run(0, one.encode(images), images, DIGESTS, int(pipeline.scheduler.timesteps[0]), 0)
    for row in range(N):
        given.clear()
        pipeline(
            "a horse, high quality", ip_adapter_image=Image.fromarray(images[row]), height=64, width=64,
            num_inference_steps=2, guidance_scale=GUIDANCE if kind else 1.0, output_type="latent",
            latents=torch.from_numpy(maps["unet-in"][row : row + 1]),
        )  # fmt: skip
        expected = given[0][0].numpy()
        assert np.linalg.norm(maps["unet-out"][row] - expected) < 1e-4 * np.linalg.norm(expected)


def test_nothing_is_left_when_it_does_not_act(source: ModelSource, adapter: Path, images: np.ndarray) -> None:
    alone = make(source, "basic")
    beside = make(source, "basic", f"ip-adapter:{adapter}", "controlnet+lora", f"controlnet+lora+ip-adapter:{adapter}")
    latents = alone.encode(images)
    plain, _ = alone.run(0, latents, images, DIGESTS, 50, 0)
    found = [beside.run(index, latents, images, DIGESTS, 50, 0)[0] for index in (1, 0, 3, 2, 0, 1)]
    assert all(np.array_equal(found[place][layer], plain[layer]) for place in (1, 4) for layer in LAYERS)
    assert all(np.array_equal(found[0][layer], found[5][layer]) for layer in LAYERS)
    for a, b in ((0, 1), (2, 3), (0, 2)):
        assert not np.array_equal(found[a]["unet-out"], found[b]["unet-out"])
    # Rows do not depend on their company.
    single, _ = beside.run(1, latents[2:], images[2:], DIGESTS[2:], 50, 0)
    assert all(np.array_equal(single[layer][0], found[0][layer][2]) for layer in LAYERS)


def test_a_scale_of_zero_is_no_adapter(source: ModelSource, adapter: Path, images: np.ndarray) -> None:
    one = make(source, "basic", f"ip-adapter:{adapter}", ip_adapter_scale=0.0)
    latents = one.encode(images)
    plain, none = (one.run(index, latents, images, DIGESTS, 50, 0)[0] for index in (0, 1))
    assert all(np.allclose(plain[layer], none[layer], rtol=1e-4, atol=1e-5) for layer in LAYERS)


def test_what_decides_the_bytes_is_in_the_parameters(source: ModelSource, adapter: Path) -> None:
    one = steer(f"ip-adapter:{adapter}", source).parameters()["ip_adapters"]
    assert [set(item) for item in one] == [{"digest", "scale"}]
    assert "ip_adapters" not in steer("basic", source).parameters()
    half = steer(f"ip-adapter:{adapter}", source, ip_adapter_scale=0.5).parameters()["ip_adapters"]
    assert (half[0]["digest"], half[0]["scale"]) == (one[0]["digest"], 0.5)
    processor = adapter.parent / "image_encoder" / "preprocessor_config.json"
    text = processor.read_text()
    try:
        processor.write_text(text + " ")
        assert steer(f"ip-adapter:{adapter}", source).parameters()["ip_adapters"][0]["digest"] != one[0]["digest"]
    finally:
        processor.write_text(text)


def test_what_is_missing_or_does_not_fit(source: ModelSource, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no IP-Adapter of its own"):
        steer("ip-adapter", source)
    with pytest.raises(BadRequestError, match="no variant 'plus'"):
        steer("ip-adapter:plus", source)
    with pytest.raises(NotFoundError, match="there is no IP-Adapter file"):
        steer(f"ip-adapter:{tmp_path}/a.safetensors", source)
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(BadRequestError, match="pickle"):
        steer(f"ip-adapter:{tmp_path}/a.bin", source)
    tensors = load_file(adapter)
    save_file(tensors, tmp_path / "alone.safetensors")
    with pytest.raises(NotFoundError, match="image encoder"):
        steer(f"ip-adapter:{tmp_path}/alone.safetensors", source)
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, projection_dim=20, num_hidden_layers=1, num_attention_heads=2,
            image_size=32, patch_size=8,
        )
    ).save_pretrained(tmp_path / "image_encoder")  # fmt: skip
    with source.load() as backbone:
        other = steer(f"ip-adapter:{tmp_path}/alone.safetensors", source)
        with pytest.raises(BadRequestError, match="width 12, its image encoder makes 20"):
            Extractor(backbone, [other], LAYERS, batch_size=1, height_px=64, width_px=64)
        del tensors["ip_adapter.1.to_k_ip.weight"]
        save_file(tensors, tmp_path / "alone.safetensors")
        broken = steer(f"ip-adapter:{tmp_path}/alone.safetensors", source)
        with pytest.raises(BadRequestError, match="cannot be loaded"):
            Extractor(backbone, [broken], LAYERS, batch_size=1, height_px=64, width_px=64)

"""Image encoder and IP-Adapter are trained, written as diffusers loads them, and found by featstore."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from featstore import models
from featstore.errors import BadRequestError, NotFoundError
from featstore.extraction.forward import Extractor
from featstore.pipelines import train_reference
from featstore.pipelines.reference.config import ModelConfig, StageConfig, TrainConfig, preset
from featstore.pipelines.reference.image_encoder import TextHead, clip_pixels, contrastive_loss, train_image_encoder
from featstore.pipelines.reference.image_prompts import linear_probe
from featstore.pipelines.reference.ip_adapter import give_ip_adapter, train_ip_adapter
from featstore.pipelines.reference.pool import PoolRender
from featstore.techniques import SteeringOptions, parse, resolve
from tests.tiny_models import TEXT_WIDTH, TextDataset, build_tiny_reference

STAGES = ("image-encoder", "ip-adapter")
WIDTH = 12
MODEL = ModelConfig(text_width=TEXT_WIDTH, vision_width=WIDTH, vision_layers=1, heads=2)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are slowed down by threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def configured(folder: Path, *, steps: int = 6) -> TrainConfig:
    config = preset(
        "smoke", work=folder / "work", out=folder / "reference", report=folder / "r", device="cpu", workers=1
    )
    stage = StageConfig(steps=steps, batch=8, learning_rate=2e-3, warmup=2, ema_decay=0.5)
    return replace(config, pool_images=32, vae_images=16, model=MODEL, image_encoder=stage, ip_adapter=stage)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A weights root whose tiny pipeline got an IP-Adapter by the two stages alone."""
    folder = tmp_path_factory.mktemp("root")
    torch.set_num_threads(1)
    build_tiny_reference(folder)
    before = digests(folder / "reference")
    train_reference.train(configured(folder), STAGES)
    after = digests(folder / "reference")
    assert before.items() <= after.items()
    assert {name.partition("/")[0] for name in after.keys() - before.keys()} == {"ip-adapter"}
    return folder


def test_files_are_those_that_ip_adapters_are_published_as(root):
    folder = root / "reference" / "ip-adapter"
    assert set(digests(folder)) == {
        "ip_adapter.safetensors",
        "image_encoder/config.json",
        "image_encoder/model.safetensors",
        "image_encoder/preprocessor_config.json",
    }
    tensors = load_file(folder / "ip_adapter.safetensors")
    unet = UNet2DConditionModel.from_pretrained(root / "reference" / "pipeline" / "unet")
    crossed = sum(name.endswith("attn2.processor") for name in unet.attn_processors)
    numbers = {name.split(".")[1] for name in tensors if name.startswith("ip_adapter.")}
    assert numbers == {str(2 * n + 1) for n in range(crossed)}
    assert tensors["image_proj.proj.weight"].shape == (4 * TEXT_WIDTH, WIDTH)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert all(tensors[f"ip_adapter.{n}.to_v_ip.weight"].any() for n in numbers)
    assert not any(str(root) in file.read_text() for file in folder.rglob("*.json"))


def test_featstore_finds_it_and_sees_what_diffusers_sees(root):
    source = models.resolve("reference", weights_root=root)
    assert source.own_parts["ip-adapter"] == ("its own",)
    (technique,) = parse("ip-adapter")
    steering = resolve(technique, dataset=TextDataset(), model=source, options=SteeringOptions())
    (found,) = steering.ip_adapters
    assert found.path == root / "reference" / "ip-adapter" / "ip_adapter.safetensors"
    image = TextDataset().image("3")
    pipeline = StableDiffusionPipeline.from_pretrained(source.folder, safety_checker=None, feature_extractor=None)
    pipeline.load_ip_adapter(
        str(found.path.parent), subfolder="", weight_name=found.path.name, image_encoder_folder="image_encoder"
    )
    expected, _ = pipeline.encode_image(Image.fromarray(image), "cpu", 1)
    with source.load() as backbone:
        backbone.ip_adapter(found.path, found.image_encoder, found.digest)
        seen = backbone.see(found.digest, image)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    # As the pictures of the pool were seen in training.
    trained = pipeline.image_encoder(clip_pixels(torch.from_numpy(image)[None])).image_embeds
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)


def test_a_scale_of_zero_is_bit_for_bit_no_adapter_and_another_is_not(root):
    source = models.resolve("reference", weights_root=root)
    options = SteeringOptions()
    steerings = [
        resolve(parse(text)[0], dataset=TextDataset(), model=source, options=options)
        for text in ("basic", "ip-adapter@0", "ip-adapter")
    ]
    layers = ("up-level1-upsampler-out", "unet-out")
    one = Extractor(
        source.load(), steerings, layers, batch_size=2, height_px=64, width_px=64, precision="float32"
    )  # fmt: skip
    images = np.stack([TextDataset().image(str(n)) for n in range(2)])
    latents = one.encode(images)
    names = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(2)]
    plain, none, some = (one.run(index, latents, images, names, 500, 0)[0] for index in range(3))
    for layer in layers:
        assert np.array_equal(plain[layer], none[layer])
        assert not np.array_equal(plain[layer], some[layer])


def test_an_untrained_adapter_changes_nothing(root):
    unet = UNet2DConditionModel.from_pretrained(root / "reference" / "pipeline" / "unet")
    latents, words = torch.randn(2, 4, 16, 16), torch.randn(2, 77, TEXT_WIDTH)
    with torch.no_grad():
        before = unet(latents, 500, words).sample
        parameters = give_ip_adapter(unet, MODEL)
        seen = {"image_embeds": [torch.randn(2, 1, WIDTH)]}
        assert torch.equal(unet(latents, 500, words, added_cond_kwargs=seen).sample, before)
    kept = {id(parameter) for parameter in parameters}
    assert kept == {id(parameter) for parameter in unet.parameters() if parameter.requires_grad}


def test_interrupted_training_equals_uninterrupted(root, tmp_path):
    build_tiny_reference(tmp_path)
    config = configured(tmp_path)
    for stop in (2, 5, None):
        render = PoolRender(config.work / "pool", images=32, seed=0, workers=1)
        train_image_encoder(config, render, stop_at=stop)
        render.close()
    for stop in (4, None):
        train_ip_adapter(config, render, stop_at=stop)
    assert digests(tmp_path / "reference" / "ip-adapter") == digests(root / "reference" / "ip-adapter")


def test_the_encoder_learns_the_captions(root, tmp_path):
    build_tiny_reference(tmp_path)
    config = configured(tmp_path, steps=200)
    train_image_encoder(config, PoolRender(root / "work" / "pool", images=32, seed=0, workers=1))
    log = (config.work / "logs" / "image-encoder.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    # Guessing among eight costs log 8 = 2.08.
    assert losses[-1] < 1.8 < losses[0]


def test_equal_captions_are_each_others_truth():
    """Against sums written out: three pictures, of which two have one caption."""
    seen = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 2.0]])
    said = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    ids = torch.tensor([[1, 2], [1, 2], [1, 3]])
    scale = 3.0
    cosine = [[1.0, 1.0, 0.0], [0.6, 0.6, 0.8], [0.0, 0.0, 1.0]]
    logits = [[scale * value for value in row] for row in cosine]
    truth = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]

    def entropy(rows: list[list[float]]) -> float:
        total = 0.0
        for row, wanted in zip(rows, truth, strict=True):
            whole = math.log(sum(math.exp(value) for value in row))
            total += sum(share * (whole - value) for share, value in zip(wanted, row, strict=True))
        return total / len(rows)

    columns = [list(column) for column in zip(*logits, strict=True)]
    expected = (entropy(logits) + entropy(columns)) / 2
    found = contrastive_loss(seen, said, torch.tensor(math.log(scale)), ids)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_what_stands_after_a_caption_is_not_read():
    torch.manual_seed(0)
    head = TextHead(8, 6, 2)
    words, padding = torch.randn(1, 5, 8), torch.tensor([[False, False, False, True, True]])
    other = words.clone()
    other[:, 3:] = torch.randn(1, 2, 8)
    assert torch.equal(head(words, padding), head(other, padding))
    assert not torch.equal(head(words, padding), head(words, torch.zeros_like(padding)))


def test_the_probe_reads_what_is_there_and_nothing_else():
    rng = np.random.default_rng(0)
    labels = ["bay", "dun"] * 20
    told = np.array([[label == "bay"] for label in labels], dtype=float) + 0.1 * rng.normal(size=(40, 1))
    assert linear_probe(told[:20], labels[:20], told[20:], labels[20:]) == 1.0
    noise = rng.normal(size=(4000, 1))
    assert linear_probe(noise[:2000], labels * 50, noise[2000:], labels * 50) < 0.6


def test_stages_say_what_they_stand_on(tmp_path):
    with pytest.raises(NotFoundError, match="no pipeline in") as caught:
        train_reference.train(configured(tmp_path), ("image-encoder",))
    assert "vae and unet" in str(caught.value.hint)


def test_an_unknown_check_is_named_with_the_nearest(tmp_path):
    with pytest.raises(BadRequestError, match="unknown check 'image-prompt'") as caught:
        train_reference.parse(["--work", str(tmp_path), "--out", str(tmp_path), "--checks", "image-prompt"])
    assert "'image-prompts'" in str(caught.value.hint)

"""The training of the reference model runs from end to end, and its parts keep what they promise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from featstore.datasets import toyhorse
from featstore.errors import BadRequestError
from featstore.pipelines import train_reference
from featstore.pipelines.reference import lora, pool
from featstore.pipelines.reference.captions import PROMPT, SUFFIXES
from featstore.pipelines.reference.config import CHECKS, ModelConfig, StageConfig, TrainConfig, preset
from featstore.pipelines.reference.data import caption_table, to_images, to_pixels
from featstore.pipelines.reference.export import load_pipeline, size_bytes
from featstore.pipelines.reference.loop import Groups, Loop
from featstore.pipelines.reference.tokens import build_tokenizer

TINY = ModelConfig(
    vae_widths=(8, 8, 8),
    unet_widths=(8, 8, 16, 16),
    hint_widths=(8, 8, 8),
    text_width=16,
    text_layers=1,
    vision_width=16,
    vision_layers=1,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are slowed down by threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def smoke(folder: Path) -> TrainConfig:
    work, out, report = folder / "work", folder / "out", folder / "report"
    config = preset("smoke", work=work, out=out, report=report, device="cpu", workers=1)
    return replace(config, pool_images=32, vae_images=16, model=TINY)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    torch.set_num_threads(1)
    train_reference.train(smoke(folder), train_reference.STAGES)
    return folder


def test_smoke_run_leaves_a_stock_model_and_its_numbers(trained):
    out, numbers = trained / "out", json.loads((trained / "report" / "evaluation.json").read_text())
    names = ["controlnet-canny", "ip-adapter", "lora", "lora-overfit", "pipeline"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert {*CHECKS, "verdict"} <= set(numbers)
    assert numbers["image-prompts"]["scale 0 is none"] is True
    assert (trained / "report" / "ip-adapter.png").exists()
    assert numbers["size"]["total_bytes"] == size_bytes(out)
    index = json.loads((out / "pipeline" / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False
    assert all(file.suffix in {".safetensors", ".json", ".txt"} for file in out.rglob("*") if file.is_file())
    assert not any(str(trained) in file.read_text() for file in out.rglob("*.json"))
    assert {p.name for p in (trained / "work" / "pack").iterdir()} == {"weights.tar.00", "report.tar.gz"}


def test_one_check_alone_keeps_the_numbers_of_the_others(trained):
    file = trained / "report" / "evaluation.json"
    before = json.loads(file.read_text())
    config = smoke(trained)
    config = replace(config, evaluation=replace(config.evaluation, checks=("image-prompts",), test_images=3))
    train_reference.train(config, ("evaluate",))
    after = json.loads(file.read_text())
    assert after["image-prompts"]["encoder"]["tested on"] == 3
    assert {name: after[name] for name in CHECKS if name != "image-prompts"} == {
        name: before[name] for name in CHECKS if name != "image-prompts"
    }


def test_second_run_of_a_finished_stage_changes_nothing(trained):
    file = trained / "out" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    train_reference.train(smoke(trained), ("vae", "unet"))
    assert file.read_bytes() == before


def test_reloaded_lora_equals_the_adapters_that_were_saved(trained, tmp_path):
    pipeline = load_pipeline(trained / "out" / "pipeline", "cpu")
    plain = _outputs(pipeline)
    lora.add_adapters(pipeline, 4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in (pipeline.unet, pipeline.text_encoder):
            for name, value in module.named_parameters():
                if "lora_" in name:
                    value.copy_(torch.randn(value.shape, generator=generator).half().float())
    steered = _outputs(pipeline)
    lora.save_lora(pipeline, tmp_path / "lora")
    again = load_pipeline(trained / "out" / "pipeline", "cpu")
    again.load_lora_weights(tmp_path / "lora", local_files_only=True)
    for want, got, without in zip(steered, _outputs(again), plain, strict=True):
        torch.testing.assert_close(got, want)
        assert (want - without).abs().max() > 1e-3


def _outputs(pipeline):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn((2, 4, 16, 16), generator=generator)
    with torch.no_grad():
        words = pipeline.text_encoder(lora.tokenize(pipeline, [PROMPT, "unseen wörds"]))[0]
        return words, pipeline.unet(latents, torch.tensor([50, 500]), words)[0]


def test_every_word_is_one_token_and_unknown_words_fall_apart(tmp_path):
    tokenizer = build_tokenizer(toyhorse.VOCABULARY, tmp_path / "tokenizer")
    for word in toyhorse.VOCABULARY:
        ids = tokenizer(word).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids[2] == tokenizer.eos_token_id
        assert len(ids) == 3, word
    unknown = tokenizer("Xylophöne 42").input_ids[1:-1]
    assert len(unknown) > 3
    assert tokenizer.unk_token_id not in unknown
    assert len(tokenizer("horse " * 200, truncation=True).input_ids) == 77


def test_joined_captions_equal_the_tokenizer(trained):
    render = pool.PoolRender(trained / "work" / "pool", images=32, seed=0, workers=1)
    tokenizer = load_pipeline(trained / "out" / "pipeline", "cpu").tokenizer
    pictures = render.wait()
    table = caption_table(pictures, tokenizer, "cpu")
    rows, suffix = torch.arange(4), torch.tensor([0, 1, 3, 6])
    joined = table.join(table.tokens[rows, 2].long(), table.lengths[rows, 2], suffix)
    texts = [pictures.captions[row][1] + SUFFIXES[s] for row, s in zip(rows, suffix, strict=True)]
    expected = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(joined, expected)


def test_rendered_pool_is_the_stream_with_its_edges(trained):
    pictures = pool.PoolRender(trained / "work" / "pool", images=32, seed=0, workers=1).wait()
    clean = int(np.flatnonzero(pictures.labels[:, 0] == 0)[0])
    picture = toyhorse.render_stream(clean, seed=0)
    assert np.array_equal(pictures.images[clean], picture.image)
    assert np.array_equal(pictures.parts[clean], picture.parts)
    edges = np.unpackbits(pictures.edges[clean], axis=-1)
    assert np.array_equal(edges * 255, pool.edges_of(picture.image))


def _toy_loop(folder: Path) -> tuple[torch.nn.Linear, Loop]:
    config = replace(smoke(folder), unet=StageConfig(steps=30, batch=1, learning_rate=1e-2, warmup=5))
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    return model, Loop("unet", config, [Groups(parameters=list(model.parameters()))])


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    results = []
    for name, stops in (("whole", [None]), ("broken", [7, 19, None])):
        for stop in stops:
            model, loop = _toy_loop(tmp_path / name)
            loop.run(lambda g, m=model: m(torch.randn((8, 3), generator=g)).square().mean(), stop_at=stop)
        with loop.averaged():
            results.append([p.detach().clone() for p in [*loop.parameters]])
        log = (tmp_path / name / "work" / "logs" / "unet.jsonl").read_text().splitlines()
        assert json.loads(log[-1])["step"] == 30
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_budget_of_minutes_becomes_a_number_of_steps(tmp_path):
    config = replace(smoke(tmp_path), unet=StageConfig(steps=9, batch=1, learning_rate=1e-2, minutes=0.01))
    model = torch.nn.Linear(3, 3)
    loop = Loop("unet", config, [Groups(parameters=list(model.parameters()))])
    loop.run(lambda g: model(torch.randn((8, 3), generator=g)).square().mean())
    assert loop.done
    assert loop.step > 200


def test_pixels_and_images_are_inverse():
    images = torch.arange(256, dtype=torch.uint8).repeat(48).view(1, 64, 64, 3)
    assert torch.equal(to_images(to_pixels(images)), images)


@pytest.mark.parametrize("wrong", [["--steps", "vae=x"], ["--steps", "pool=3"], ["--stages", "vea"]])
def test_a_wrong_command_line_is_a_bad_request(wrong, tmp_path):
    with pytest.raises(BadRequestError):
        train_reference.parse(["--work", str(tmp_path), "--out", str(tmp_path), *wrong])

"""Prompts in chunks, against stock text encoders that are given each chunk's words as a text of their own.

The tiny tokenizer has a token for each of the words used here, so the first 75 words are the first chunk.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from featstore import models
from featstore.extraction.forward import Extractor
from featstore.extraction.passes import Pass
from featstore.models import ModelSource
from featstore.models.backbones.base import Backbone
from featstore.models.families import open_folder
from featstore.techniques import SteeringOptions, parse, resolve
from tests.tiny_models import TextDataset
from tests.tiny_sdxl import build_tiny_sdxl

WORDS = [("horse", "a", "b", "c", "d", "e", "f")[n * n % 7] for n in range(180)]
LAYERS = ("up-level1-repeat0-vit-block0-cross-map", "attn-up-cross-2", "attn-up-self-4", "up-level2-repeat1-res-out")
SIDE_PX = 64
TIMESTEP, SEED, SCALE = 400, 3, 2.5


@pytest.fixture(scope="module")
def source(weights_root: Path) -> ModelSource:
    return models.resolve("reference", weights_root=weights_root)


@pytest.fixture(scope="module")
def backbone(source: ModelSource) -> Iterator[Backbone]:
    with source.load() as loaded:
        yield loaded


def chunk_texts(words: list[str], chunks: int) -> list[str]:
    return [" ".join(words[75 * n : 75 * (n + 1)]) for n in range(chunks)]


@torch.no_grad()
def stock(folder: Path, texts: list[str]) -> torch.Tensor:
    """Embeddings (1, 77 * texts, width) of texts, each alone, side by side."""
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokens = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert tokens.shape == (len(texts), 77), "a text is longer than a chunk"
    return torch.cat([encoder(row[None]).last_hidden_state for row in tokens], dim=1)


@pytest.mark.parametrize(("count", "chunks"), [(0, 2), (3, 1), (3, 2), (75, 2), (76, 2), (150, 2), (100, 3), (180, 3)])
def test_each_chunk_is_encoded_as_a_text_of_its_own(
    source: ModelSource, backbone: Backbone, caplog: pytest.LogCaptureFixture, count: int, chunks: int
) -> None:
    with caplog.at_level(logging.WARNING):
        found = backbone.encode_text(" ".join(WORDS[:count]), chunks)["encoder_hidden_states"]
    assert not caplog.records
    expected = stock(source.folder, chunk_texts(WORDS[:count], chunks))
    assert found.shape == (1, 77 * chunks, expected.shape[-1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_one_chunk_gives_the_bytes_it_always_gave(source: ModelSource, backbone: Backbone) -> None:
    for text in ("a horse, b", "", " ".join(WORDS)):
        one = backbone.encode_text(text)["encoder_hidden_states"]
        tokens = backbone.tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            assert torch.equal(one, backbone.text_encoder(tokens.input_ids)[0])
        assert torch.equal(one, backbone.encode_text(text, 1)["encoder_hidden_states"])
        assert torch.equal(one, backbone.encode_text(text, 3)["encoder_hidden_states"][:, :77])


def test_what_does_not_fit_into_the_chunks_is_warned_of(backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cut = backbone.encode_text(" ".join([*WORDS[:150], "tail", "end"]), 2)["encoder_hidden_states"]
    assert "prompt cut after 150 tokens; left out: 'tail end'" in caplog.text
    assert torch.equal(cut, backbone.encode_text(" ".join(WORDS[:150]), 2)["encoder_hidden_states"])


def test_words_of_all_chunks_have_their_places(source: ModelSource) -> None:
    found = source.tokens(" ".join(WORDS), 2)
    expected = [""] * 154
    for n, word in enumerate(WORDS[:150]):
        expected[77 * (n // 75) + 1 + n % 75] = word
    assert found == expected
    assert source.tokens("a horse", 2) == [*source.tokens("a horse"), *[""] * 77]


def test_only_maps_of_cross_attention_get_more_channels(source: ModelSource) -> None:
    one, three = source.layer_names(64, 96), source.layer_names(64, 96, 3)
    grown = {name for name in one if one[name] != three[name]}
    assert grown == {name for name in one if re.search("cross-map$|^attn-(down|mid|up)-cross", name)}
    for name in grown:
        assert one[name][0] == 77
        assert three[name] == (231, *one[name][1:])
    assert source.resolve_layers("attn-up-cross-2", 64, 96, 3) == {"attn-up-cross-2": three["attn-up-cross-2"]}


def handwritten() -> ModuleType:
    spec = importlib.util.spec_from_file_location("handwritten", Path(__file__).with_name("handwritten.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def noised(folder: Path, image: np.ndarray, digest: str) -> torch.Tensor:
    vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True).eval()
    latents = vae.encode(torch.from_numpy(image).permute(2, 0, 1)[None] / 255.0 * 2 - 1).latent_dist.mode()
    key = int(hashlib.sha256(f"featstore noise|{SEED}|{digest}|{TIMESTEP}".encode()).hexdigest()[:32], 16)
    draw = np.random.Generator(np.random.Philox(key=key)).standard_normal(latents.shape[1:], dtype=np.float32)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scaled = latents * vae.config.scaling_factor
    return scheduler.add_noise(scaled, torch.from_numpy(draw)[None], torch.tensor([TIMESTEP]))


@torch.no_grad()
def test_maps_under_chunks_and_guidance(source: ModelSource, backbone: Backbone) -> None:
    """Two passes beside each other with other numbers of chunks; guidance leads from two chunks of nothing."""
    data, (plain, guided) = TextDataset(), parse("prompt,cfg+prompt:caption")
    long, short = " ".join(WORDS[:120]), " ".join(WORDS[:4])
    steerings = [
        resolve(plain, dataset=data, model=source, options=SteeringOptions(prompt=short)),
        resolve(guided, dataset=data, model=source, options=SteeringOptions(guidance_scale=SCALE, prompt_chunks=2)),
        resolve(plain, dataset=data, model=source, options=SteeringOptions(prompt=long, prompt_chunks=2)),
    ]
    extractor = Extractor(
        backbone, steerings, LAYERS, batch_size=3, height_px=SIDE_PX, width_px=SIDE_PX, precision="float32"
    )
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    latents = extractor.encode(images)
    unet = UNet2DConditionModel.from_pretrained(source.folder / "unet", use_safetensors=True).eval()
    nothing = stock(source.folder, ["", ""])
    captions = [short, long]
    passes = [
        Pass(steering=index, rows=np.arange(2), timestep=TIMESTEP, seed=SEED, captions=captions) for index in range(3)
    ]
    results = {index: maps.wait() for index, maps in extractor.run_all(latents, images, digests, passes)}
    for index, texts in enumerate(([short] * 2, captions, [long] * 2)):
        found, bad = results[index]
        assert bad == {}
        chunks = steerings[index].prompt_chunks
        for row in range(2):
            x = noised(source.folder, images[row], digests[row])
            text = stock(source.folder, chunk_texts(texts[row].split(), chunks))
            expected = handwritten().forward(unet, x, TIMESTEP, text)
            if steerings[index].guidance is not None:
                empty = handwritten().forward(unet, x, TIMESTEP, nothing)
                lead = {name: empty[name] + SCALE * (expected[name] - empty[name]) for name in expected}
                # Probabilities stay those under the prompt.
                expected = {n: expected[n] if "cross" in n or "self" in n else lead[n] for n in expected}
            for layer in LAYERS:
                assert found[layer].shape[1:] == source.layer_names(SIDE_PX, SIDE_PX, chunks)[layer]
                wanted = expected[layer][0].numpy()
                difference = np.linalg.norm(found[layer][row] - wanted) / np.linalg.norm(wanted)
                assert difference < 1e-4, (index, row, layer, difference)


@torch.no_grad()
def test_sdxl_takes_its_pooled_text_from_the_first_chunk(tmp_path: Path) -> None:
    folder = build_tiny_sdxl(tmp_path / "xl")
    words = WORDS[:100]
    states: list[torch.Tensor] = []
    pooled: Any = None
    for name, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        encoder = kind.from_pretrained(folder / f"text_encoder{name}").eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder / f"tokenizer{name}")
        tokens = tokenizer(chunk_texts(words, 2), padding="max_length", max_length=77, return_tensors="pt").input_ids
        outputs = [encoder(row[None], output_hidden_states=True) for row in tokens]
        states.append(torch.cat([output.hidden_states[-2] for output in outputs], dim=1))
        pooled = getattr(outputs[0], "text_embeds", None)
    with open_folder("xl", folder).load() as xl:
        found = xl.encode_text(" ".join(words), 2)
        torch.testing.assert_close(found["encoder_hidden_states"], torch.cat(states, dim=-1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["text_embeds"], pooled, rtol=1e-5, atol=1e-6)
        assert xl.encode_unguided(2)["encoder_hidden_states"].shape == found["encoder_hidden_states"].shape

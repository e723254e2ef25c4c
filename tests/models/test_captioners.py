"""Captioners against a greedy search written out here, an image at a time, without generate and without a cache."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipForConditionalGeneration,
    BlipProcessor,
    GitForCausalLM,
    GitProcessor,
    Kosmos2ForConditionalGeneration,
    Kosmos2Processor,
)

from featstore.errors import BadRequestError, NotFoundError
from featstore.models.captioners import KINDS, open_captioner
from tests.models.fake_hub import FakeHub
from tests.tiny_captioners import build_tiny_blip2, build_tiny_git, build_tiny_kosmos2

STEPS = 8
Ids = list[int]


@pytest.fixture(scope="module")
def folders(blip: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("captioners")
    return {
        "blip": blip,
        "blip-2 opt": build_tiny_blip2(home / "opt"),
        "blip-2 t5": build_tiny_blip2(home / "t5", "t5"),
        "git": build_tiny_git(home / "git"),
        "kosmos-2": build_tiny_kosmos2(home / "kosmos2"),
    }


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.kron(rng.integers(0, 256, (3, 4, 3), np.uint8), np.ones((20, 20, 1), np.uint8)) for _ in range(5)]


def greedy(step: Callable[[Ids], torch.Tensor], begin: Ids, end: int) -> Ids:
    """New tokens: the likeliest one at each of a few steps, until the end token."""
    ids = list(begin)
    for _ in range(STEPS):
        ids.append(int(step(ids).argmax()))
        if ids[-1] == end:
            break
    return ids[len(begin) :]


def blip_text(folder: Path, image: Image.Image, prompt: str) -> str:
    model, processor = BlipForConditionalGeneration.from_pretrained(folder), BlipProcessor.from_pretrained(folder)
    seen = model.eval().vision_model(processor(images=image, return_tensors="pt").pixel_values)[0]
    mask = torch.ones(seen.shape[:2], dtype=torch.long)
    names = processor.tokenizer.get_vocab()

    def step(ids: Ids) -> torch.Tensor:
        output = model.text_decoder(torch.tensor([ids]), encoder_hidden_states=seen, encoder_attention_mask=mask)
        return output.logits[0, -1]

    begin = [names["[DEC]"], *processor.tokenizer(prompt, add_special_tokens=False).input_ids]
    return processor.tokenizer.decode(greedy(step, begin, names["[SEP]"]), skip_special_tokens=True)


def blip2_text(folder: Path, image: Image.Image, prompt: str) -> str:
    model, processor = Blip2ForConditionalGeneration.from_pretrained(folder), Blip2Processor.from_pretrained(folder)
    pixels = processor.image_processor(image, return_tensors="pt").pixel_values
    patches = model.eval().vision_model(pixels).last_hidden_state
    asked = model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=patches).last_hidden_state
    seen = model.language_projection(asked)
    embed = model.get_input_embeddings()
    words = processor.tokenizer(prompt, add_special_tokens=False).input_ids
    end = processor.tokenizer.eos_token_id
    if model.language_model.config.is_encoder_decoder:
        before = torch.cat([seen, embed(torch.tensor([[*words, end]]))], dim=1)

        def step(ids: Ids) -> torch.Tensor:
            return model.language_model(inputs_embeds=before, decoder_input_ids=torch.tensor([ids])).logits[0, -1]

        new = greedy(step, [0], end)
    else:

        def step(ids: Ids) -> torch.Tensor:
            inputs = torch.cat([seen, embed(torch.tensor([ids]))], dim=1)
            return model.language_model(inputs_embeds=inputs).logits[0, -1]

        new = greedy(step, [end, *words], end)
    return processor.tokenizer.decode(new, skip_special_tokens=True)


def git_text(folder: Path, image: Image.Image, prompt: str) -> str:
    model, processor = GitForCausalLM.from_pretrained(folder).eval(), GitProcessor.from_pretrained(folder)
    pixels = processor(images=image, return_tensors="pt").pixel_values
    names = processor.tokenizer.get_vocab()

    def step(ids: Ids) -> torch.Tensor:
        return model(torch.tensor([ids]), pixel_values=pixels).logits[0, -1]

    begin = [names["[CLS]"], *processor.tokenizer(prompt, add_special_tokens=False).input_ids]
    return processor.tokenizer.decode(greedy(step, begin, names["[SEP]"]), skip_special_tokens=True)


def kosmos2_text(folder: Path, image: Image.Image, prompt: str) -> str:
    model = Kosmos2ForConditionalGeneration.from_pretrained(folder).eval()
    processor = Kosmos2Processor.from_pretrained(folder)
    begin = processor(images=image, text=prompt, return_tensors="pt")
    shown = begin.image_embeds_position_mask[0].tolist()

    def step(ids: Ids) -> torch.Tensor:
        places = torch.tensor([shown + [0] * (len(ids) - len(shown))])
        return model(
            pixel_values=begin.pixel_values, input_ids=torch.tensor([ids]), image_embeds_position_mask=places
        ).logits[0, -1]

    new = greedy(step, begin.input_ids[0].tolist(), processor.tokenizer.eos_token_id)
    return re.sub("<[^>]*>", "", processor.tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("blip", blip_text),
        ("blip-2 opt", blip2_text),
        ("blip-2 t5", blip2_text),
        ("git", git_text),
        ("kosmos-2", kosmos2_text),
    ],
)
@pytest.mark.parametrize("prompt", ["", "a photo of"])
@torch.inference_mode()
def test_texts_are_those_of_a_greedy_search(
    folders: dict[str, Path], images: list[np.ndarray], kind: str, expected: Any, prompt: str
) -> None:
    captioner = open_captioner(str(folders[kind])).load("cpu", "float32")
    found = captioner.captions(images, prompt=prompt, max_new_tokens=STEPS, batch_size=2)
    wanted = [expected(folders[kind], Image.fromarray(image), prompt) for image in images]
    assert found == [" ".join(text.split()) for text in wanted]
    assert len(set(found)) > 1, "all images have the same text: the test sees nothing"
    # Other neighbours in a batch, the same texts.
    again = captioner.captions(images[::-1], prompt=prompt, max_new_tokens=STEPS, batch_size=2)
    assert again == found[::-1]


def test_what_kosmos_2_says_of_places_is_no_caption(folders: dict[str, Path]) -> None:
    captioner = open_captioner(str(folders["kosmos-2"])).load("cpu", "float32")
    tagged = "a<phrase> red cat</phrase><object><patch_index_0001><patch_index_0003></object> on the mat ."
    ids = captioner._processor.tokenizer(tagged, add_special_tokens=False, return_tensors="pt").input_ids
    captioner._model.generate = lambda **inputs: torch.cat([inputs["input_ids"], ids], dim=1)
    (text,) = captioner.captions([np.zeros((9, 9, 3), np.uint8)], prompt="give", max_new_tokens=1, batch_size=1)
    assert text == "a red cat on the mat ."


def test_the_digest_covers_weights_and_tokenizer(blip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(blip, tmp_path / "elsewhere")
    (folder / "README.md").write_text("another word")
    assert open_captioner(str(folder)).digest == open_captioner(str(blip)).digest
    digests = set()
    for name in ("tokenizer.json", "processor_config.json", "model.safetensors"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b" ")
        digests.add(open_captioner(str(folder)).digest)
        (folder / name).write_bytes(before)
    assert len(digests | {open_captioner(str(blip)).digest}) == 4


def test_what_is_no_captioner_is_refused(blip: Path, weights_root: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no captioner folder nowhere") as caught:
        open_captioner("nowhere")
    assert "blip-image-captioning-base" in str(caught.value.hint)
    with pytest.raises(BadRequestError, match=r"is a CLIPTextModel.*BlipForConditionalGeneration.*Kosmos2"):
        open_captioner(str(weights_root / "reference" / "pipeline" / "text_encoder"))
    folder = shutil.copytree(blip, tmp_path / "blip")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BlipForQuestionAnswering"]}))
    with pytest.raises(BadRequestError, match="is a BlipForQuestionAnswering"):
        open_captioner(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadRequestError, match="pickle"):
        open_captioner(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(NotFoundError, match="no weights in"):
        open_captioner(str(folder))


def test_an_id_of_the_hub_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path))
    with pytest.raises(NotFoundError, match=r"some/captioner.*the Hub cannot be reached") as caught:
        open_captioner("some/captioner")
    assert "hf download some/captioner" in str(caught.value.hint)


def test_a_captioner_of_the_hub_is_fetched_once(blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = shutil.copytree(blip, tmp_path / "served")
    (served / "pytorch_model.bin").write_bytes(b"a pickle")
    (served / "README.md").write_text("words")
    (served / "onnx").mkdir()
    (served / "onnx" / "config.json").write_text("{}")
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path / "weights"))
    with FakeHub() as hub:
        hub.connect(monkeypatch, tmp_path)
        hub.add("some/captioner", served)
        source = open_captioner("some/captioner")
        assert hub.fetched() == {path.name for path in blip.iterdir()}
        assert (source.name, source.digest) == ("some/captioner", open_captioner(str(blip)).digest)
        hub.stop()
        hub.log.clear()
        assert open_captioner("some/captioner").digest == source.digest
        assert not hub.log
    shutil.copytree(blip, tmp_path / "weights" / "some_captioner")
    assert open_captioner("some/captioner").folder == tmp_path / "weights" / "some_captioner"


def test_a_captioner_lacking_tensors_is_refused(blip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(blip, tmp_path / "blip")
    weights = load_file(folder / "model.safetensors")
    del weights["text_decoder.bert.embeddings.position_embeddings.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFoundError, match="lack 1 tensors"):
        open_captioner(str(folder)).load("cpu", "float32")


def test_every_kind_is_there() -> None:
    import transformers

    for kind in KINDS.values():
        assert hasattr(transformers, kind.model)
        assert hasattr(transformers, kind.processor)

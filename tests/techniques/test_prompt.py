"""Texts of `prompt` and its variants."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from featstore import datasets, models
from featstore.datasets import DatasetInfo
from featstore.errors import BadRequestError, NotFoundError
from featstore.models import ModelSource
from featstore.pipelines.reference import captions as training
from featstore.techniques import TECHNIQUES, Steering, SteeringOptions, parse, resolve
from tests.tiny_models import TextDataset

PRAISE = "high quality, best quality, highly realistic, masterpiece"


@pytest.fixture
def source(weights_root: Path) -> ModelSource:
    return models.resolve("reference", weights_root=weights_root)


def steer(text: str, source: ModelSource, dataset: Any = None, **options: Any) -> Steering:
    (technique,) = parse(text)
    return resolve(technique, dataset=dataset or TextDataset(), model=source, options=SteeringOptions(**options))


@pytest.mark.parametrize(
    ("text", "prompt", "own"),
    [
        ("prompt:neutral", "a horse", "a red bus"),
        ("prompt:high", f"a horse, {PRAISE}", f"a red bus, {PRAISE}"),
        ("prompt:low", "a horse, low quality, worst quality, blurry", "a red bus, low quality, worst quality, blurry"),
    ],
)
def test_quality(source: ModelSource, text: str, prompt: str, own: str) -> None:
    assert steer(text, source).prompt == prompt
    # A text of one's own takes the plain one's place; without a plain text the words stand alone.
    assert steer(text, source, prompt="a red bus").prompt == own
    assert steer(text, source, prompt="").prompt == own.partition("a red bus")[2].removeprefix(", ")
    assert steer(text, source).parameters()["prompt"] == prompt


def test_toyhorse_takes_the_words_that_its_model_was_trained_with(source: ModelSource) -> None:
    toyhorse = datasets.resolve("toyhorse")
    low, high = (steer(f"prompt:{name}", source, toyhorse).prompt for name in ("low", "high"))
    assert low == training.LOW_PROMPT
    assert high == training.PROMPT
    trained = {training.CLASS_CAPTION + suffix for suffix in training.SUFFIXES}
    assert {low, high, steer("prompt:neutral", source, toyhorse).prompt} <= trained


def test_a_data_set_may_bring_words_of_its_own(source: ModelSource) -> None:
    class Night(TextDataset):
        @property
        def info(self) -> DatasetInfo:
            return dataclasses.replace(super().info, quality_words={"low": "dark"})

    assert steer("prompt:low", source, Night()).prompt == "a horse, dark"
    assert steer("prompt:high", source, Night()).prompt == f"a horse, {PRAISE}"


@pytest.mark.parametrize("other", ["prompt:low+prompt:high", "prompt+prompt:caption", "prompt:neutral+prompt"])
def test_a_pass_has_one_text(other: str) -> None:
    with pytest.raises(BadRequestError, match="exclude each other"):
        parse(other)


def test_variants_are_documented_and_no_others_are_taken() -> None:
    for variant in ("caption", "low", "neutral", "high"):
        assert variant in TECHNIQUES["prompt"].VARIANTS
        parse(f"prompt:{variant}+controlnet,cfg+prompt:{variant}")
    with pytest.raises(BadRequestError, match=r"'prompt' has no variant 'hi'.*prompt:high") as caught:
        parse("prompt:hi")
    assert "did you mean 'high'" in str(caught.value.hint)
    assert "--prompt" in str(caught.value.hint)


def test_captions_of_a_file_go_before_those_of_the_data_set(source: ModelSource, tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"0": "a cat"}))
    for dataset in (TextDataset(), TextDataset(captions=False)):
        steering = steer("prompt:caption", source, dataset, captions=file)
        assert steering.captions is not None
        assert steering.captions.texts == {"0": "a cat"}
        assert steering.parameters()["captions"] == steering.captions.source == steering.caption_source
        assert (steering.prompt, steering.caption_kind) == (None, None)
    # Others do not read the file.
    assert steer("prompt", source, captions=tmp_path / "absent.json").captions is None
    with pytest.raises(NotFoundError, match=r"absent\.json"):
        steer("prompt:caption", source, captions=tmp_path / "absent.json")
    with pytest.raises(BadRequestError, match="has no captions") as caught:
        steer("prompt:caption", source, TextDataset(captions=False))
    assert "--captions FILE" in str(caught.value.hint)


def test_chunks_are_part_of_recipes_where_they_act(source: ModelSource) -> None:
    assert "prompt_chunks" not in steer("prompt", source, prompt_chunks=1).parameters()
    for text in ("basic", "prompt", "prompt:caption"):
        assert steer(text, source, prompt_chunks=3).parameters()["prompt_chunks"] == 3
    with pytest.raises(BadRequestError, match="--prompt-chunks 0"):
        SteeringOptions(prompt_chunks=0)


class Whole(models.ModelSource):
    """A family whose text encoder takes a text whole."""

    techniques = frozenset({"prompt"})
    name = "t5"
    text_tokens = 0

    def __init__(self, tokens: int) -> None:
        self.text_tokens = tokens


Whole.__abstractmethods__ = frozenset()


@pytest.mark.parametrize(("tokens", "reason"), [(300, "texts of up to 300 tokens whole"), (0, "takes no text")])
def test_other_text_encoders_take_no_chunks(tokens: int, reason: str) -> None:
    steer("prompt", Whole(tokens), prompt_chunks=1)
    with pytest.raises(BadRequestError, match=f"--prompt-chunks 2: model 't5'.*{reason}"):
        steer("prompt", Whole(tokens), prompt_chunks=2)

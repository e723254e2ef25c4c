from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from featstore import models
from featstore.datasets import DatasetInfo
from featstore.errors import BadRequestError, FeatstoreError, NotFoundError
from featstore.models import ModelSource
from featstore.models.families import open_folder
from featstore.recipe import canonical_json
from featstore.techniques import Steering, SteeringOptions, parse, resolve
from tests.tiny_models import TextDataset


@pytest.fixture
def source(weights_root: Path) -> ModelSource:
    return models.resolve("reference", weights_root=weights_root)


def steer(text: str, source: ModelSource, *, dataset: TextDataset | None = None, **options: Any) -> Steering:
    (technique,) = parse(text)
    return resolve(technique, dataset=dataset or TextDataset(), model=source, options=SteeringOptions(**options))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("basic", "a horse"),
        ("controlnet", "a horse"),
        ("lora", "a horse"),
        ("prompt", "a horse, high quality"),
        ("controlnet:canny+lora+prompt", "a horse, high quality"),
        ("prompt:caption", None),
    ],
)
def test_texts(source: ModelSource, text: str, prompt: str | None) -> None:
    steering = steer(text, source)
    assert steering.prompt == prompt
    assert steering.expression == text
    assert (steering.caption_kind, steering.caption_source) == (
        ("fine", "toyhorse/fine/1") if prompt is None else (None, None)
    )


def test_a_prompt_of_ones_own_replaces_the_detailed_text_only(source: ModelSource) -> None:
    assert steer("prompt", source, prompt="my text").prompt == "my text"
    assert steer("prompt", source, prompt="").prompt == ""
    assert steer("basic", source, prompt="my text").prompt == "a horse"
    bare = TextDataset(prompt=None, captions=False)
    assert steer("prompt", source, dataset=bare, prompt="my text").prompt == "my text"
    with pytest.raises(BadRequestError, match="no detailed prompt of its own") as caught:
        steer("prompt", source, dataset=bare)
    assert "--prompt" in str(caught.value.hint)
    with pytest.raises(BadRequestError, match="has no captions"):
        steer("prompt:caption", source, dataset=bare)


def test_parameters_are_plain_json_of_all_that_decides_bytes(source: ModelSource, weights_root: Path) -> None:
    lora = weights_root / "reference" / "lora-overfit" / "pytorch_lora_weights.safetensors"
    steering = steer("lora:overfit+controlnet+prompt", source, controlnet_scale=0.5, lora_scale=2.0)
    parameters = steering.parameters()
    assert json.loads(canonical_json(parameters)) == parameters
    assert parameters["prompt"] == "a horse, high quality"
    assert parameters["captions"] is None
    assert parameters["loras"] == [{"digest": sha256(lora), "scale": 2.0}]
    (controlnet,) = parameters["controlnets"]
    assert controlnet["scale"] == 0.5
    assert controlnet["condition"] == {"detector": "canny", "low": 100, "high": 200}
    assert steer("basic", source).parameters() == {
        "prompt": "a horse",
        "captions": None,
        "controlnets": [],
        "loras": [],
    }
    assert steer("prompt:caption", source).parameters()["captions"] == "toyhorse/fine/1"


def test_the_digest_of_a_controlnet_covers_its_configuration_and_weights(source: ModelSource, tmp_path: Path) -> None:
    own = source.controlnet_folder("canny")
    assert own is not None
    folder = shutil.copytree(own, tmp_path / "c")
    digests = {
        steer("controlnet", source).controlnets[0].digest,
        steer(f"controlnet:{folder}", source).controlnets[0].digest,
    }
    assert len(digests) == 1, "another place is another digest"
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b" ")
        digests.add(steer(f"controlnet:{folder}", source).controlnets[0].digest)
        (folder / name).write_bytes(before)
    assert len(digests) == 3


def test_loras_by_file_and_by_folder(source: ModelSource, weights_root: Path) -> None:
    folder = weights_root / "reference" / "lora"
    file = folder / "pytorch_lora_weights.safetensors"
    digests = [steer(f"lora:{place}", source).loras[0].digest for place in (folder, file)]
    assert digests == [sha256(file)] * 2 == [steer("lora", source).loras[0].digest] * 2
    with pytest.raises(BadRequestError, match="twice in one pass"):
        steer(f"lora+lora:{file}", source)
    assert len(steer("lora+lora:overfit", source).loras) == 2


class Photos(TextDataset):
    @property
    def info(self) -> DatasetInfo:
        return dataclasses.replace(super().info, name="photos")


@pytest.mark.parametrize(
    ("text", "kind", "message", "hint"),
    [
        ("lora:overfitted", NotFoundError, "no LoRA variant 'overfitted'.*lora:overfit", "lora:./overfitted"),
        ("lora:./absent.safetensors", NotFoundError, "there is no LoRA file absent.safetensors", ""),
        ("lora:./weights.ckpt", BadRequestError, r"weights\.ckpt is a pickle", "safetensors"),
        ("controlnet:./absent", NotFoundError, "there is no ControlNet folder absent", ""),
    ],
)
def test_what_is_missing_is_refused(
    source: ModelSource, text: str, kind: type[FeatstoreError], message: str, hint: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        steer(text, source)
    assert hint in str(caught.value.hint)


def test_defaults_that_a_model_or_data_set_lacks(source: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no LoRA for data set 'photos'") as caught:
        steer("lora", source, dataset=Photos())
    assert "lora:PATH.safetensors" in str(caught.value.hint)
    other = open_folder("other", shutil.copytree(source.folder, tmp_path / "models" / "other"))
    with pytest.raises(NotFoundError, match="'other' has no canny ControlNet") as caught:
        steer("controlnet", other)
    assert "controlnet:PATH" in str(caught.value.hint)
    beside = shutil.copytree(source.folder.parent / "controlnet-canny", tmp_path / "models" / "controlnet-canny")
    assert steer("controlnet", other).controlnets[0].folder == beside


def test_controlnets_that_do_not_fit(source: ModelSource, tmp_path: Path) -> None:
    own = source.controlnet_folder("canny")
    assert own is not None
    for change, message in (
        ({"block_out_channels": [320, 640, 1280, 1280]}, "another architecture.*block_out_channels"),
        ({"cross_attention_dim": 768}, "cross_attention_dim is 768, the model's is 16"),
        ({"conditioning_embedding_out_channels": [4, 8, 8, 8]}, "reduces its condition 8 times"),
        ({"_class_name": "T2IAdapter"}, "holds a T2IAdapter"),
        ({"conditioning_channels": 1}, "takes 1 channels"),
    ):
        folder = shutil.copytree(own, tmp_path / "c", dirs_exist_ok=True)
        config = json.loads((own / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(BadRequestError, match=message):
            steer(f"controlnet:{folder}", source)
    with pytest.raises(BadRequestError, match="is a file"):
        steer(f"controlnet:{own}/diffusion_pytorch_model.safetensors", source)
    weights = folder / "diffusion_pytorch_model.safetensors"
    shutil.copy(own / "config.json", folder / "config.json")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BadRequestError, match="pickle"):
        steer(f"controlnet:{folder}", source)


def test_scales_are_numbers(source: ModelSource) -> None:
    with pytest.raises(BadRequestError, match="controlnet_scale nan"):
        steer("controlnet", source, controlnet_scale=float("nan"))

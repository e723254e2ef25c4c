from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from featstore import models
from featstore.errors import BadRequestError, FeatstoreError, NotFoundError
from featstore.models import ModelSource
from featstore.models.families import open_folder
from featstore.techniques import Steering, SteeringOptions, parse, resolve
from featstore.techniques.controlnet import VARIANTS, _check_fit
from featstore.techniques.detectors import DETECTORS
from tests.tiny_models import TextDataset


@pytest.fixture
def annotators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of annotators with files of a few bytes, which planning does not look into."""
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(tmp_path))
    folder = tmp_path / "annotators"
    folder.mkdir()
    for detector in DETECTORS.values():
        for name in detector.files:
            (folder / name).write_bytes(name.encode())
    return folder


@pytest.fixture
def source(weights_root: Path) -> ModelSource:
    """The tiny model with one and the same ControlNet for every variant but openpose's."""
    home = weights_root / "reference"
    own = home / "controlnet-canny"
    controlnets = {"canny": own, "depth": own, "hed": own, "lineart": own}
    return open_folder("tiny", home / "pipeline", controlnets=controlnets)


def steer(text: str, source: ModelSource, **options: Any) -> Steering:
    (technique,) = parse(text)
    return resolve(technique, dataset=TextDataset(), model=source, options=SteeringOptions(**options))


def test_several_with_their_detectors_and_scales(source: ModelSource, annotators: Path) -> None:
    text = "controlnet@0.25+controlnet:depth+controlnet:hed@-1+controlnet:lineart@0"
    steering = steer(text, source, controlnet_scale=2.0, allow_pickle=True)
    assert steering.expression == text
    found = [(ref.detector.name, ref.scale) for ref in steering.controlnets]
    assert found == [("canny", 0.25), ("depth", 2.0), ("hed", -1.0), ("lineart", 0.0)]
    listed = steering.parameters()["controlnets"]
    assert [one["scale"] for one in listed] == [0.25, 2.0, -1.0, 0.0]
    assert [one["condition"]["detector"] for one in listed] == ["canny", "depth", "hed", "lineart"]
    assert all(len(one["condition"]["digest"]) == 64 for one in listed[1:])
    assert listed[0]["condition"] == {"detector": "canny", "low": 100, "high": 200}


def test_the_weights_of_a_detector_are_part_of_the_recipe(source: ModelSource, annotators: Path) -> None:
    before = steer("controlnet:hed", source, allow_pickle=True).parameters()
    (annotators / "ControlNetHED.pth").write_bytes(b"other weights")
    assert steer("controlnet:hed", source, allow_pickle=True).parameters() != before
    canny = steer("controlnet", source).parameters()
    assert steer("controlnet", source, allow_pickle=True).parameters() == canny


def test_a_folder_is_fed_with_the_detector_that_is_named(
    source: ModelSource, annotators: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = source.controlnet_folder("canny")
    assert own is not None
    monkeypatch.chdir(tmp_path)
    for name in ("Net", "depth=Net"):
        shutil.copytree(own, tmp_path / name)
    cases = {
        "controlnet:./Net": ("canny", "Net"),
        f"controlnet:{tmp_path}/Net": ("canny", f"{tmp_path}/Net"),
        "controlnet:depth=Net": ("depth", "Net"),
        "controlnet:openpose-full=./Net@0.5": ("openpose-full", "Net"),
        "controlnet:./depth=Net": ("canny", "depth=Net"),
        "controlnet:hed=./depth=Net": ("hed", "depth=Net"),
    }
    for text, (detector, folder) in cases.items():
        (ref,) = steer(text, source, allow_pickle=True).controlnets
        assert (ref.detector.name, str(ref.folder)) == (detector, folder)
    both = steer("controlnet:./Net+controlnet:depth=Net", source, allow_pickle=True)
    assert len(both.controlnets) == 2, "the same weights, fed with two things"
    with pytest.raises(BadRequestError, match="twice in one pass"):
        steer("controlnet:depth=Net+controlnet:depth=./Net", source, allow_pickle=True)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("controlnet:dept=./x", "unknown detector 'dept'; known: .*depth", "controlnet:./dept=./x"),
        ("controlnet:Depth=./x", "unknown detector 'Depth'", "controlnet:./Depth=./x"),
        ("controlnet:depth=", "no folder after 'depth='", "controlnet:depth=PATH"),
        (
            "controlnet:hd",
            "unknown variant of technique 'controlnet' 'hd'; known: PATH .*hed",
            "mean 'hed'? For a folder write controlnet:./hd",
        ),
    ],
)
def test_detectors_that_do_not_exist(text: str, message: str, hint: str) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        parse(text)
    assert hint in str(caught.value.hint)


def test_the_variants_are_documented() -> None:
    assert all(name in VARIANTS for name in (*DETECTORS, "DETECTOR=PATH", "@SCALE"))


@pytest.mark.parametrize(
    ("text", "kind", "message", "hint"),
    [
        ("controlnet:openpose-full", NotFoundError, "'tiny' has no openpose ControlNet", "openpose-full=PATH"),
        ("controlnet:depth=./absent", NotFoundError, "there is no ControlNet folder absent", ""),
        ("controlnet:hed", BadRequestError, "ControlNetHED.pth .* is a pickle", "--allow-pickle"),
    ],
)
def test_what_is_missing(
    source: ModelSource, annotators: Path, text: str, kind: type[FeatstoreError], message: str, hint: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        steer(text, source)
    assert hint in str(caught.value.hint)


def test_a_detector_without_weights_is_refused_while_planning(source: ModelSource, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATSTORE_WEIGHTS", str(tmp_path))
        with pytest.raises(NotFoundError, match=f"no ControlNetHED.pth in {tmp_path}/annotators"):
            steer("controlnet:hed", source)


def test_controlnets_of_other_kinds(source: ModelSource, tmp_path: Path) -> None:
    own = source.controlnet_folder("canny")
    assert own is not None
    folder = shutil.copytree(own, tmp_path / "c")
    for change, message in (
        ({"block_out_channels": [320, 640, 1280, 1280]}, "another architecture.*block_out_channels"),
        ({"block_out_channels": [8, 16, 16]}, r"block_out_channels is \[8, 16, 16\], the model's is"),
        ({"layers_per_block": 1}, "layers_per_block is 1, the model's is 2"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type is text_time, the model's is None"),
        ({"class_embed_type": "timestep"}, "class_embed_type is timestep"),
        ({"global_pool_conditions": True}, "pools what it adds over the whole image"),
        ({"conditioning_channels": 1}, "takes 1 channels; conditions have 3"),
        ({"_class_name": "T2IAdapter"}, "holds a T2IAdapter, not a ControlNetModel"),
        ({"_class_name": "ControlNetUnionModel"}, "holds a ControlNetUnionModel, not a ControlNetModel"),
    ):
        config = json.loads((own / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(BadRequestError, match=message):
            steer(f"controlnet:{folder}", source)
    header = json.dumps({"lora_controlnet": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    file = tmp_path / "control-lora-canny.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(BadRequestError, match="is a Control-LoRA, not a ControlNetModel"):
        steer(f"controlnet:{file}", source)


def test_a_controlnet_with_pooled_texts_and_sizes_fits_such_a_model_only(weights_root: Path, tmp_path: Path) -> None:
    shape = {"in_channels": 4, "block_out_channels": [320, 640, 1280], "layers_per_block": 2}
    texts = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    config = shape | texts | {"cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 2816}
    model: Any = SimpleNamespace(name="large", denoiser_config=config, latent_factor=8)
    own = {"_class_name": "ControlNetModel", "conditioning_embedding_out_channels": [16, 32, 96, 256], **config}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(own))
    _check_fit(tmp_path, model)
    path.write_text(json.dumps(own | {"projection_class_embeddings_input_dim": 2560}))
    with pytest.raises(BadRequestError, match="projection_class_embeddings_input_dim is 2560, the model's is 2816"):
        _check_fit(tmp_path, model)
    path.write_text(json.dumps(own))
    small = models.resolve("reference", weights_root=weights_root)
    with pytest.raises(BadRequestError, match="another architecture"):
        _check_fit(tmp_path, small)

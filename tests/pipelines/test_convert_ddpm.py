"""Checkpoints of guided-diffusion: converted, every layer is that of a forward pass on the checkpoint itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import featstore.store
from featstore import models
from featstore.errors import BadRequestError, NotFoundError, StorageError
from featstore.models.entries import CONFIGS
from featstore.models.unconditional_layers import decoder_blocks
from featstore.pipelines.convert_ddpm import ConvertDDPMConfig, convert_ddpm
from featstore.pipelines.extract import extract
from featstore.pipelines.guided_diffusion import architecture
from featstore.pipelines.plan import ExtractConfig, make_plan
from tests.models.handwritten_ddpm import Guided
from tests.models.test_ddpm import SEED, SIZE, TIMESTEP, check, extracted, noised, pictures, relative

GUIDED: dict[str, dict[str, Any]] = {
    "lsun-shaped": {},
    "convolutions": {
        "mult": (1, 2),
        "resnets": 1,
        "attends": (False, True),
        "head": 32,
        "resblock_updown": False,
        "scale_shift": False,
        "out": 3,
    },
}


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Guided, Path]]:
    """Hand-written UNets of guided-diffusion, saved as it saves them and converted."""
    root = tmp_path_factory.mktemp("ddpm")
    made = {}
    for name, options in GUIDED.items():
        unet = Guided(**options)
        unet.forward(torch.zeros(1, 3, 32, 32), 0)
        torch.save(unet.state, root / f"{name}.pt")
        config = ConvertDDPMConfig(
            checkpoint=root / f"{name}.pt",
            folder=root / name,
            allow_pickle=True,
            image_size_px=32,
            head_channels=unet.head,
        )
        report = convert_ddpm(config)
        assert report.parameters == sum(value.numel() for value in unet.state.values())
        made[name] = (unet, root / name)
    return made


@pytest.mark.parametrize("name", GUIDED)
def test_every_layer_of_a_converted_checkpoint(guided: dict[str, tuple[Guided, Path]], name: str) -> None:
    unet, folder = guided[name]
    images = pictures(3, *SIZE)
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    found = extracted(folder, images, digests)
    wanted, blocks = unet.forward(noised(images, digests, TIMESTEP), TIMESTEP)
    check(found, wanted)
    layers = decoder_blocks(models.resolve(str(folder)).denoiser_config)
    assert len(layers) == len(blocks)
    for layer, value in zip(layers, blocks, strict=True):
        assert relative(found[layer], value) < 1e-4, layer
    source = models.resolve(str(folder))
    if name == "lsun-shaped":
        assert next(iter(source.presets)) == source.default_layers == "ddpm-segmentation"
        for layer, index in zip(source.expand_layers("ddpm-segmentation"), (5, 6, 7, 8, 12), strict=True):
            assert relative(found[layer], blocks[index]) < 1e-4
    else:
        assert source.default_layers == "legacy"
        assert "ddpm-segmentation" not in source.presets


def test_denoising_takes_the_noise_and_leaves_the_variance(guided: dict[str, tuple[Guided, Path]]) -> None:
    unet, folder = guided["lsun-shaped"]
    images = pictures(2, *SIZE)
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    found = extracted(folder, images, digests, denoise_from=TIMESTEP + 2)
    x = noised(images, digests, TIMESTEP + 2)
    left = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for now in (TIMESTEP + 2, TIMESTEP + 1):
        predicted = unet.forward(x, now)[0]["unet-out"][:, :3]
        clean = (x - (1 - left[now]) ** 0.5 * predicted) / left[now] ** 0.5
        x = left[now - 1] ** 0.5 * clean + (1 - left[now - 1]) ** 0.5 * predicted
    check(found, unet.forward(x.float(), TIMESTEP)[0])


def test_layers_and_sizes_come_from_the_configuration(guided: dict[str, tuple[Guided, Path]]) -> None:
    source = models.resolve(f"ddpm:{guided['lsun-shaped'][1]}")
    assert (source.name, source.text_tokens, source.latent_factor, source.latent_channels) == ("lsun-shaped", 0, 1, 3)
    assert (source.default_image_size_px, source.size_multiple_px, source.techniques) == (32, 16, frozenset())
    assert source.expand_layers("ddpm-segmentation") == (
        "up-level1-upsampler-out",
        "up-level2-repeat0-res-out",
        "up-level2-repeat1-res-out",
        "up-level2-upsampler-out",
        "up-level4-repeat0-res-out",
    )
    shapes = source.layer_names(64, 32)
    assert shapes["up-level1-upsampler-out"] == (64, 16, 8)
    assert shapes["down-level3-repeat1-vit-self-map"] == (8 * 4, 8, 4)
    assert shapes["attn-up-self-16"] == (4 * 2, 4, 2)
    assert source.expand_layers("legacy") == (
        *(f"up-level{i}-upsampler-out" for i in range(4)),
        "up-level4-repeat2-res-out",
    )
    assert set(source.presets["full"]) == {name for name in shapes if not name.startswith("attn-")}
    assert models.resolve(str(source.folder)).weights_digest == source.weights_digest


def test_features_of_a_folder_of_images(guided: dict[str, tuple[Guided, Path]], tmp_path: Path) -> None:
    unet, folder = guided["lsun-shaped"]
    images = pictures(3, 32, 32)
    (tmp_path / "photos").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "photos" / f"{index}.png")
    files = sorted((tmp_path / "photos").iterdir())
    config = ExtractConfig(
        dataset=f"folder:{tmp_path / 'photos'}",
        techniques="basic",
        model=f"ddpm:{folder}",
        timesteps=(50, 150, 250),
        store=str(tmp_path / "features.zarr"),
        device="cpu",
        batch_size=2,
        seed=SEED,
    )
    assert not extract(config).failed
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    stored = featstore.store.open(config.store).dataset("photos")
    for timestep in config.timesteps:
        run = stored.run("basic", timestep=timestep)
        _, blocks = unet.forward(noised(images, digests, timestep), timestep)
        layers = models.resolve(str(folder)).expand_layers("ddpm-segmentation")
        assert set(run.layers) == set(layers)
        for layer, block in zip(layers, (5, 6, 7, 8, 12), strict=True):
            assert relative(np.asarray(run[layer], dtype=np.float32), blocks[block]) < 1e-3, (timestep, layer)
    plan = make_plan(config)
    assert plan.passes_todo == 0
    # A text that the model never sees is no part of what names its features.
    assert all(one.recipe.parameters["prompt"] == "" for one in plan.runs)


@pytest.mark.parametrize("technique", ["prompt", "controlnet:canny", "lora:./some.safetensors", "cfg", "basic,prompt"])
def test_what_steers_by_text_is_refused_with_the_reason(
    guided: dict[str, tuple[Guided, Path]], photos: Path, tmp_path: Path, technique: str
) -> None:
    config = ExtractConfig(
        dataset=f"folder:{photos}",
        techniques=technique,
        model=f"ddpm:{guided['lsun-shaped'][1]}",
        store=str(tmp_path / "features.zarr"),
        device="cpu",
    )
    with pytest.raises(BadRequestError, match=r"means nothing for model 'lsun-shaped' \(DDPM\)") as caught:
        make_plan(config)
    assert caught.value.exit_code == 2
    assert caught.value.hint == "it can be steered by: basic"


def lsun(**options: Any) -> Guided:
    """The UNet of MODEL_FLAGS of guided-diffusion's README for LSUN, without values."""
    plain: dict[str, Any] = {"channels": 256, "mult": (1, 1, 2, 2, 4, 4), "head": 64, "meta": True}
    unet = Guided(**plain | {"attends": (False, False, False, True, True, True)} | options)
    unet.forward(torch.zeros(1, 3, 256, 256, device="meta"), 50)
    return unet


def test_the_lsun_models_are_known_by_their_shapes() -> None:
    unet = lsun()
    # Dhariwal and Nichol, 2021, table 12: 552 M parameters.
    assert sum(value.numel() for value in unet.state.values()) == 552_814_086
    made = architecture({key: tuple(value.shape) for key, value in unet.state.items()})
    config = made.unet_config(image_size_px=256, head_channels=64)
    assert config["block_out_channels"] == [256, 256, 512, 512, 1024, 1024]
    assert config["down_block_types"] == ["ResnetDownsampleBlock2D"] * 3 + ["AttnDownBlock2D"] * 3
    assert config["up_block_types"] == ["AttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"] * 3
    shipped = json.loads((CONFIGS / "ddpm" / "unet" / "config.json").read_text())
    assert {key: shipped[key] for key in config} == config
    source = models.describe("ddpm")
    assert (source.default_image_size_px, source.default_layers) == (256, "ddpm-segmentation")
    shapes = source.resolve_layers("ddpm-segmentation", 256, 256)
    assert shapes == {
        "up-level1-upsampler-out": (1024, 32, 32),
        "up-level2-repeat0-vit-out": (512, 32, 32),
        "up-level2-repeat1-vit-out": (512, 32, 32),
        "up-level2-upsampler-out": (512, 64, 64),
        "up-level4-repeat0-res-out": (256, 128, 128),
    }
    # The channels of its features at three steps in ddpm-segmentation's experiments.
    assert 3 * sum(channels for channels, _, _ in shapes.values()) == 8448
    _, blocks = unet.forward(torch.zeros(1, 3, 256, 256, device="meta"), 50)
    assert list(shapes.values()) == [tuple(blocks[block].shape[1:]) for block in (5, 6, 7, 8, 12)]
    with pytest.raises(NotFoundError, match="weights of model 'ddpm'") as caught:
        _ = source.weights_digest
    assert "featstore convert-ddpm" in str(caught.value.hint)


SMALL = GUIDED["convolutions"]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    unet = Guided(**SMALL)
    unet.forward(torch.zeros(1, 3, 8, 8), 0)
    return unet.state


def converted(path: Path, state: Any, **options: Any) -> None:
    torch.save(state, path / "checkpoint.pt")
    plain = {"image_size_px": 32, "head_channels": 32, "allow_pickle": True}
    convert_ddpm(ConvertDDPMConfig(checkpoint=path / "checkpoint.pt", folder=path / "made", **plain | options))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"input_blocks.1.0.in_layers.2.weight": None}, r"'input_blocks\.1\.0\.in_layers\.2\.weight' is missing"),
        ({"output_blocks.3.0.skip_connection.bias": None}, r"'output_blocks\.3\.0\.skip_connection\.bias' is missing"),
        ({"input_blocks.9.0.in_layers.2.weight": (4, 4, 3, 3)}, r"'input_blocks\.9\.0\.in_layers\.2\.weight' has no p"),
        ({"middle_block.0.out_layers.3.weight": (8, 64, 3, 3)}, r"'middle_block\.0\.out_layers\.3\.weight' has shape"),
        ({"middle_block.1.qkv.weight": (64, 64, 1)}, r"'middle_block\.1\.qkv\.weight' has shape \(64, 64, 1\)"),
        ({"label_emb.weight": (10, 128)}, r"'label_emb\.weight' makes it a model of classes"),
        ({"time_embed.0.weight": None}, r"'time_embed\.0\.weight' is not among its"),
        ({"time_embed.0.weight": (128, 16)}, r"'time_embed\.0\.weight' is made for 16 channels"),
        ({"input_blocks.0.0.weight": (32, 6, 3, 3)}, r"'input_blocks\.0\.0\.weight' takes 6 channels"),
        ({"output_blocks.4.0.in_layers.0.weight": (32,)}, "makes uneven levels"),
        ({"input_blocks.3.1.qkv.weight": None}, r"'input_blocks\.3\.1\.qkv\.weight' is missing"),
        ({"step": 7}, "'step' is a int, where a tensor is expected"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(
    state: dict[str, torch.Tensor], tmp_path: Path, edits: dict[str, Any], message: str
) -> None:
    edited: dict[str, Any] = dict(state)
    for key, change in edits.items():
        edited.pop(key, None)
        if change is not None:
            edited[key] = torch.zeros(change) if isinstance(change, tuple) else change
    with pytest.raises(BadRequestError, match=message):
        converted(tmp_path, edited)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allow_pickle": False}, r"checkpoint\.pt is a pickle"),
        ({"head_channels": 48}, "--head-channels 48 does not divide attention of 64 channels"),
        ({"image_size_px": 33}, "--image-size 33 is no multiple of 2"),
    ],
)
def test_options_that_cannot_be(
    state: dict[str, torch.Tensor], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequestError, match=message):
        converted(tmp_path, state, **options)
    assert not (tmp_path / "made").exists()


class Trap:
    """What a pickle can hold besides tensors."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("sprung",))


def test_pickles_run_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadRequestError, match="cannot be read as a state dict"):
        converted(tmp_path, {"time_embed.0.weight": Trap()})
    assert "sprung" not in capfd.readouterr().out
    with pytest.raises(BadRequestError, match="holds a list, no state dict"):
        converted(tmp_path, [torch.zeros(1)])
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(BadRequestError, match="cannot be read as a state dict"):
        convert_ddpm(
            ConvertDDPMConfig(checkpoint=tmp_path / "checkpoint.pt", folder=tmp_path / "made", allow_pickle=True)
        )
    with pytest.raises(NotFoundError, match="there is no checkpoint"):
        convert_ddpm(ConvertDDPMConfig(checkpoint=tmp_path / "absent.pt", folder=tmp_path / "made", allow_pickle=True))


def test_safetensors_need_no_leave_and_nothing_is_overwritten(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "half.safetensors")
    config = ConvertDDPMConfig(
        checkpoint=tmp_path / "half.safetensors", folder=tmp_path / "made", image_size_px=32, head_channels=32
    )
    (tmp_path / "made").mkdir()
    report = convert_ddpm(config)
    assert report.to_json() == {
        "folder": str(tmp_path / "made"),
        "model": f"ddpm:{tmp_path / 'made'}",
        "image_size_px": 32,
        "widths": [32, 64],
        "layers_per_block": 1,
        "attention_at_px": [16],
        "learned_variance": False,
        "parameters": sum(value.numel() for value in state.values()),
    }
    assert models.resolve(str(tmp_path / "made")).default_image_size_px == 32
    with pytest.raises(BadRequestError, match="exists already"):
        convert_ddpm(config)


def test_a_failure_half_way_leaves_nothing(
    state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers.DDPMScheduler.save_pretrained", full)
    with pytest.raises(StorageError, match=r"made cannot be written.*No space left"):
        converted(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]

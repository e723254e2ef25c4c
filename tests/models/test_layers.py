"""Layer names and shapes against a stock UNet on the meta device, walked and hooked by this test itself."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from featstore.errors import BadRequestError
from featstore.models.layers import Read, presets, taps

CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {
        "block_out_channels": (8, 16, 16, 24),
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
    },
    "sd15": {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd21": {
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "sdxl-shaped": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
    },
    "uneven": {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": (1, 3),
        "mid_block_type": None,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
    },
    "a depth for each transformer": {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "transformer_layers_per_block": ((1, 2), (3, 1)),
        "reverse_transformer_layers_per_block": ((4, 1, 2), (2, 1, 3)),
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "norm_num_groups": 4,
    },
}


@functools.cache
def meta_unet(name: str) -> UNet2DConditionModel:
    plain = {"down_block_types": CROSS, "up_block_types": UP, "layers_per_block": 2, "sample_size": 64}
    with torch.device("meta"):
        return UNet2DConditionModel(**{**plain, **CONFIGS[name]})


def walked(unet: UNet2DConditionModel, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of everything that has a plain name, found from the module names of the UNet and one forward."""
    rules = [
        (r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)", r"\1-level\2-repeat\3-res-out"),
        (r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.conv2", r"\1-level\2-repeat\3-res-increment"),
        (r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)", r"\1-level\2-repeat\3-vit-out"),
        (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0", r"\1-level\2-\3sampler-out"),
        (r"mid_block\.resnets\.(\d+)", r"mid-repeat\1-res-out"),
        (r"mid_block\.resnets\.(\d+)\.conv2", r"mid-repeat\1-res-increment"),
        (r"mid_block\.attentions\.0", "mid-vit-out"),
        (r"conv_in", "unet-after-conv-in"),
        (r"conv_out", "unet-out"),
    ]
    block = r"(?:(down|up)_blocks\.(\d+)\.attentions\.(\d+)|(mid)_block\.attentions\.0)\.transformer_blocks\.(\d+)"
    inner = {"": "out", ".ff.net.0": "ffn-inner", ".attn2.to_q": "cross-q"}
    inner |= {f".attn1.to_{name}": f"self-{name}" for name in "qkv"}
    shapes: dict[str, tuple[int, ...]] = {"unet-in": (unet.config.in_channels, height, width)}

    def record(layer: str) -> Any:
        def hook(_: object, __: object, output: Any) -> None:
            assert layer not in shapes, f"{layer} is passed twice"
            shapes[layer] = tuple((output[0] if isinstance(output, tuple) else output).shape[1:])

        return hook

    handles = []
    for name, module in unet.named_modules():
        for pattern, layer in rules:
            if match := re.fullmatch(pattern, name):
                handles.append(module.register_forward_hook(record(match.expand(layer))))
        if match := re.fullmatch(rf"{block}(.*)", name):
            stage, level, repeat, mid, k, rest = match.groups()
            if rest in inner:
                prefix = "mid-vit" if mid else f"{stage}-level{level}-repeat{repeat}-vit"
                handles.append(module.register_forward_hook(record(f"{prefix}-block{k}-{inner[rest]}")))
    with torch.device("meta"):
        text = torch.zeros(1, 77, unet.config.cross_attention_dim)
        unet(torch.zeros(1, 4, height, width), torch.zeros((), dtype=torch.long), encoder_hidden_states=text)
    for handle in handles:
        handle.remove()
    return shapes


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(64, 64), (32, 48)])
def test_every_module_of_the_grammar_has_its_name_and_shape(name: str, size: tuple[int, int]) -> None:
    unet = meta_unet(name)
    found = walked(unet, *size)
    ours = {n: t.shape(*size) for n, t in taps(unet.config, text_tokens=77).items() if t.read is not Read.ATTENTION}
    assert set(ours) == set(found)
    for layer, (channels, height, width) in ours.items():
        shape = found[layer]
        if len(shape) == 2:  # tokens: (H * W, C)
            assert shape == (height * width, channels), layer
        else:
            assert shape == (channels, height, width), layer


@pytest.mark.parametrize("name", CONFIGS)
def test_taps_name_modules_that_exist(name: str) -> None:
    unet = meta_unet(name)
    modules = dict(unet.named_modules())
    for layer, tap in taps(unet.config, text_tokens=77).items():
        assert tap.layer == layer
        assert all(module in modules for module in tap.modules)


def test_aggregated_attention_gathers_all_layers_of_a_size() -> None:
    unet = meta_unet("sd15")
    known = taps(unet.config, text_tokens=77)
    names = {n for n in known if n.startswith("attn-")}
    sizes = {"down": (1, 2, 4), "mid": (8,), "up": (4, 2, 1)}
    assert names == {f"attn-{s}-{k}-{f}" for s, fs in sizes.items() for f in fs for k in ("cross", "self")}
    assert known["attn-up-cross-2"].modules == tuple(
        f"up_blocks.2.attentions.{j}.transformer_blocks.0.attn2" for j in range(3)
    )
    assert known["attn-up-cross-2"].shape(64, 64) == (77, 32, 32)
    assert known["attn-up-self-4"].shape(64, 64) == (256, 16, 16)
    everything = [m for n in names for m in known[n].modules]
    attentions = [n for n, m in unet.named_modules() if n.endswith((".attn1", ".attn2"))]
    assert sorted(everything) == sorted(attentions)
    maps = {m for n, t in known.items() if n.endswith("-map") for m in t.modules}
    assert maps == set(attentions)


def test_legacy_preset_is_the_papers_at_512_px() -> None:
    unet = meta_unet("sd15")
    known, chosen = taps(unet.config, text_tokens=77), presets(unet.config, text_tokens=77)
    shapes = {name: known[name].shape(64, 64) for name in chosen["legacy"]}
    assert shapes == {
        "up-level0-upsampler-out": (1280, 16, 16),
        "up-level1-upsampler-out": (1280, 32, 32),
        "up-level2-upsampler-out": (640, 64, 64),
        "up-level3-repeat2-vit-out": (320, 64, 64),
        "attn-up-cross-2": (77, 32, 32),
        "attn-up-cross-4": (77, 16, 16),
    }
    convolutional = [s for n, s in shapes.items() if not n.startswith("attn")]
    assert sum(c for c, _, _ in convolutional) == 3520
    assert sum(c * h * w for c, h, w in convolutional) == 5_570_560
    assert chosen["practical"] == (
        "up-level1-repeat1-vit-block0-cross-q",
        "up-level1-repeat2-res-out",
        "up-level2-repeat1-vit-block0-cross-q",
        "up-level3-repeat0-vit-block0-self-k",
    )
    assert not any("attn-" in name for name in chosen["full"])
    assert len(chosen["full"]) == len(set(chosen["full"])) > 190


def test_presets_of_a_unet_without_the_papers_layers() -> None:
    chosen = presets(meta_unet("uneven").config, text_tokens=77)
    assert chosen["legacy"] == ("up-level0-upsampler-out", "up-level1-repeat1-vit-out")
    assert "practical" not in chosen
    xl = presets(meta_unet("sdxl-shaped").config, text_tokens=77)
    assert xl["legacy"][2] == "up-level2-repeat2-res-out"


def test_a_unet_with_other_blocks_is_refused() -> None:
    config = dict(meta_unet("tiny").config)
    config["up_block_types"] = ("AttnUpBlock2D", *UP[1:])
    with pytest.raises(BadRequestError, match=r"AttnUpBlock2D.*CrossAttnUpBlock2D"):
        taps(config, text_tokens=77)

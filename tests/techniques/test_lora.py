"""What ``lora`` refuses before anything is loaded, and which scale a LoRA gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from featstore import models
from featstore.errors import BadRequestError, NotFoundError
from featstore.models import ModelSource
from featstore.techniques import Steering, SteeringOptions, parse, resolve
from tests.tiny_models import TextDataset

Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
K = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
WIDTH = 24
"""Channels in the middle of the tiny UNet."""


@pytest.fixture(scope="module")
def source(weights_root: Path) -> ModelSource:
    return models.resolve("reference", weights_root=weights_root)


def steer(text: str, source: ModelSource, **options: Any) -> Steering:
    (technique,) = parse(text)
    return resolve(technique, dataset=TextDataset(), model=source, options=SteeringOptions(**options))


def pair(name: str, down: tuple[int, ...], up: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_down.weight": torch.ones(down), f"{name}.lora_up.weight": torch.ones(up)}


GOOD = pair(Q, (4, WIDTH), (WIDTH, 4))
UNET = "model.diffusion_model."


@pytest.mark.parametrize(
    ("tensors", "message", "hint"),
    [
        ({}, "holds no LoRA: it has no tensors", "lora_A.weight"),
        ({"conv_in.weight": torch.ones(2)}, r"no tensor is named so \(conv_in\.weight\)", "lora_A.weight"),
        (GOOD | {"conv_in.bias": torch.ones(2)}, "1 of its 3 tensors mean nothing here: conv_in.bias", ""),
        (GOOD | {f"{Q}.hada_w1_a": torch.ones(2)}, "is a LoHa", "MERGED"),
        (GOOD | {f"{Q}.lokr_w1": torch.ones(2)}, "is a LoKr", "MERGED"),
        (GOOD | {f"{Q}.dora_scale": torch.ones(2)}, "is a DoRA", "MERGED"),
        (GOOD | {f"{Q}.diff_b": torch.ones(2)}, "1 of its 3 tensors mean nothing here", ""),
        (GOOD | pair("lora_te2_text_projection", (4, 9), (9, 4)), "lacks 1 of its 2 modules: lora_te2_text", "trained"),
        (pair(K, (4, 2048), (WIDTH, 4)), "its mid_block.*attn2.to_k is 24 x 2048, the model's 24 x 16", "SDXL"),
        (pair(K, (4, 768), (WIDTH, 4)), "24 x 768", "Stable Diffusion 1"),
        (pair(Q, (4, 7), (WIDTH, 4)), "does not fit this model", "trained"),
        ({f"{Q}.lora_down.weight": torch.ones(4, WIDTH)}, "has no up matrix", ""),
        (pair(Q, (4, WIDTH), (WIDTH, 5)), "damaged: the factors of .* are 24 x 5, 4 x 24", ""),
        (pair(Q, (0, WIDTH), (WIDTH, 0)), "damaged", ""),
        (GOOD | {f"{Q}.alpha": torch.ones(2)}, "damaged", ""),
        (GOOD | pair(Q.replace("lora_unet", "lycoris"), (4, WIDTH), (WIDTH, 4)), "2 of its 4 tensors mean", ""),
        ({f"{UNET}time_embed.0.weight": torch.ones(3, 3)}, "does not fit this model", "trained"),
        ({f"{UNET}no_such.weight": torch.ones(3, 3)}, "it lacks .* tensors of its unet", "trained"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_shape(
    source: ModelSource, tmp_path: Path, tensors: dict[str, torch.Tensor], message: str, hint: str
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(BadRequestError, match=message) as caught:
        steer(f"lora:{path}", source)
    assert hint in str(caught.value.hint)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_none(source: ModelSource, weights_root: Path, tmp_path: Path) -> None:
    whole = (weights_root / "reference" / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    for content in (
        b"",
        b"no safetensors",
        whole[:2000],
        whole[:-1],
        whole + b"x",
        b"\xff" * 20,
        b"\2" + b"\0" * 7 + b"[]",
    ):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(BadRequestError, match="cannot be read as safetensors") as caught:
            steer(f"lora:{path}", source)
        assert "damaged" in str(caught.value.hint)
    with pytest.raises(NotFoundError, match="there is no LoRA file"):
        steer(f"lora:{tmp_path}/absent.safetensors", source)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("no json", "lora_adapter_metadata cannot be read"),
        (json.dumps({"unet.r": 4, "unet.lora_alpha": "much"}), "its lora_alpha 'much' is no number"),
        (json.dumps({"unet.r": 4, "unet.alpha_pattern": {"(a+)+": 2}}), "alpha_pattern .* no plain module name"),
    ],
)
def test_metadata_that_says_no_alpha(source: ModelSource, tmp_path: Path, metadata: str, message: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file(GOOD, path, {"lora_adapter_metadata": metadata})
    with pytest.raises(BadRequestError, match=message):
        steer(f"lora:{path}", source)


def test_pickles_need_leave(source: ModelSource, tmp_path: Path) -> None:
    path = tmp_path / "merged.ckpt"
    torch.save(GOOD, path)
    with pytest.raises(BadRequestError, match="is a pickle") as caught:
        steer(f"lora:{path}", source)
    assert "--allow-pickle" in str(caught.value.hint)
    (ref,) = steer(f"lora:{path}", source, allow_pickle=True).loras
    assert ref.path == path
    with pytest.raises(BadRequestError, match=r"is no \.safetensors file"):
        steer(f"lora:{tmp_path}/merged.txt", source, allow_pickle=True)


def test_each_lora_has_the_scale_of_its_own_or_of_all(source: ModelSource) -> None:
    scales = {ref.path.parent.name: ref.scale for ref in steer("lora@0.7+lora:overfit", source, lora_scale=0.5).loras}
    assert scales == {"lora": 0.7, "lora-overfit": 0.5}
    assert [ref.scale for ref in steer("lora@0+lora:overfit@-1", source).loras] == [0.0, -1.0]


def test_the_same_weights_twice(source: ModelSource, weights_root: Path, tmp_path: Path) -> None:
    own = weights_root / "reference" / "lora" / "pytorch_lora_weights.safetensors"
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(own.read_bytes())
    with pytest.raises(BadRequestError, match="twice in one pass") as caught:
        steer(f"lora+lora:{copy}", source)
    assert "@2" in str(caught.value.hint)
    # Other bytes are another LoRA.
    save_file(load_file(own), copy, {"note": "mine"})
    assert len(steer(f"lora+lora:{copy}", source).loras) == 2

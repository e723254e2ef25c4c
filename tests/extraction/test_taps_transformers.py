"""Taps on transformers: where the pass stops, which output is read, which keys; values are tested for exactness."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel

from featstore.extraction.taps import TapSession, select
from featstore.models.layers import Keys, Tap
from featstore.models.transformer_layers import Transformer, taps

TEXT = 7
COMMON = {"sample_size": 16, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 12}


@functools.cache
def network(name: str) -> tuple[Any, dict[str, Tap]]:
    torch.manual_seed(0)
    shape = {"blocks": 3, "width": 24, "patch": 2, "text_tokens": TEXT}
    if name == "pixart":
        model = PixArtTransformer2DModel(cross_attention_dim=24, caption_channels=8, **COMMON)
        return model.eval(), taps(Transformer(latent_channels=4, joint=False, **shape))
    config = {"caption_projection_dim": 24, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    sd3 = SD3Transformer2DModel(dual_attention_layers=(1,), qk_norm="rms_norm", in_channels=6, **config, **COMMON)
    return sd3.eval(), taps(Transformer(latent_channels=6, joint=True, second=(1,), **shape))


def inputs(name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    channels = 4 if name == "pixart" else 6
    given: dict[str, Any] = {
        "latent_size": (8, 12),
        "hidden_states": torch.randn(2, channels, 8, 12, generator=generator),
        "encoder_hidden_states": torch.randn(2, TEXT, 8, generator=generator),
        "timestep": torch.tensor([50, 50]),
    }
    if name == "pixart":
        given["encoder_attention_mask"] = torch.tensor([[1] * 3 + [0] * (TEXT - 3)] * 2)
        given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    else:
        given["pooled_projections"] = torch.randn(2, 8, generator=generator)
    return given


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_the_forward_stops_after_the_last_layer_that_is_read(name: str) -> None:
    model, known = network(name)
    attention = "attn" if name == "sd3" else "attn1"
    stops = {
        "vit-block1-self-map": f"transformer_blocks.1.{attention}.{'norm_added_k' if name == 'sd3' else 'to_k'}",
        "vit-block2-self-q": f"transformer_blocks.2.{attention}.to_q",
        "vit-block0-ffn-inner": "transformer_blocks.0.ff.net.0.proj",
    }
    for layer, last in stops.items():
        called: list[str] = []
        handles = [
            module.register_forward_hook(lambda *_, part=part, called=called: called.append(part))
            for part, module in model.named_modules()
            if not list(module.children())
        ]
        with torch.inference_mode(), TapSession(model, select(known, (layer, "latent-in"))) as session:
            session.run(**inputs(name))
        for handle in handles:
            handle.remove()
        assert called[-1] == last
    assert hooks(model) == 0


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_reading_all_changes_nothing_and_no_map_depends_on_the_others(name: str) -> None:
    model, known = network(name)
    given = inputs(name)
    plain = {key: value for key, value in given.items() if key != "latent_size"}
    outputs = []
    handle = model.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    with torch.inference_mode():
        model(**plain, return_dict=False)
        with TapSession(model, tuple(known.values())) as session:
            together = session.run(**given)
        model(**plain, return_dict=False)
        assert torch.equal(*outputs)
        for layer in ("vit-block1-cross-map", "attn-cross-2", "attn-self-2", "vit-block2-out", "patch-embed-out"):
            with TapSession(model, select(known, (layer,))) as session:
                assert torch.equal(session.run(**given)[layer], together[layer])
    handle.remove()
    assert list(together) == list(known)
    assert hooks(model) == 0
    for layer, value in together.items():
        assert tuple(value.shape[1:]) == known[layer].shape(8, 12)
    one = torch.ones(2, 4, 6)
    if name == "pixart":
        assert (together["vit-block0-cross-map"][:, 3:] == 0).all()
        torch.testing.assert_close(together["attn-cross-2"].sum(1), one)
    else:
        # One softmax over image and text.
        both = together["vit-block0-self-map"].sum(1) + together["vit-block0-cross-map"].sum(1)
        torch.testing.assert_close(both, one)
        torch.testing.assert_close(together["vit-block1-self2-map"].sum(1), one)


def test_keys_of_one_kind_need_joint_attention() -> None:
    model, known = network("pixart")
    tap = known["vit-block0-self-map"]
    wrong = Tap(
        layer="x", modules=tap.modules, read=tap.read, channels=tap.channels, factor=tap.factor, keys=Keys.IMAGE
    )
    with (
        pytest.raises(RuntimeError, match="not joint"),
        torch.inference_mode(),
        TapSession(model, (wrong,)) as session,
    ):
        session.run(**inputs("pixart"))

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from featstore import models
from featstore.extraction.taps import TapSession, select
from featstore.models import ModelSource


@pytest.fixture
def source(weights_root: Path) -> ModelSource:
    return models.resolve("reference", weights_root=weights_root)


@pytest.fixture
def unet(source: ModelSource) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(source.folder / "unet", use_safetensors=True).eval()


def inputs(count: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "latent_size": (16, 16),
        "sample": torch.randn(count, 4, 16, 16, generator=generator),
        "timestep": torch.tensor(50),
        "encoder_hidden_states": torch.randn(count, 77, 16, generator=generator),
    }


def hooks(unet: UNet2DConditionModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


def test_the_forward_stops_after_the_last_layer_that_is_read(unet: UNet2DConditionModel, source: ModelSource) -> None:
    order = [name for name, module in unet.named_modules() if not list(module.children())]
    for layers, last in (
        (("up-level0-upsampler-out", "down-level0-repeat0-res-out"), "up_blocks.0.upsamplers.0.conv"),
        (("attn-up-cross-2",), "up_blocks.2.attentions.2.transformer_blocks.0.attn2.to_k"),
        (("unet-in",), None),
        (("mid-vit-block0-self-q",), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
    ):
        called: list[str] = []
        handles = [
            m.register_forward_hook(lambda *_, name=name, called=called: called.append(name))
            for name, m in unet.named_modules()
            if name in order
        ]
        with torch.inference_mode(), TapSession(unet, select(source.taps, layers)) as session:
            session.run(**inputs())
        for handle in handles:
            handle.remove()
        assert (called[-1] if last else None) == last
        assert not any(name.startswith(("up_blocks.3", "conv_out")) for name in called)


def test_reading_all_changes_nothing_and_leaves_no_hook(unet: UNet2DConditionModel, source: ModelSource) -> None:
    given = inputs()
    with torch.inference_mode():
        plain = unet(given["sample"], given["timestep"], encoder_hidden_states=given["encoder_hidden_states"]).sample
        with TapSession(unet, tuple(source.taps.values())) as session:
            assert hooks(unet) > 200
            maps = session.run(**given)
        assert hooks(unet) == 0
        after = unet(given["sample"], given["timestep"], encoder_hidden_states=given["encoder_hidden_states"]).sample
    assert torch.equal(maps["unet-out"], plain)
    assert torch.equal(after, plain)
    assert list(maps) == list(source.taps)
    assert torch.equal(maps["unet-in"], given["sample"])


def test_maps_do_not_depend_on_which_others_are_read(unet: UNet2DConditionModel, source: ModelSource) -> None:
    given, everything = inputs(), tuple(source.taps.values())
    with torch.inference_mode():
        with TapSession(unet, everything) as session:
            together = session.run(**given)
        for layer in ("up-level1-upsampler-out", "attn-up-cross-4", "down-level1-repeat0-vit-block0-self-map"):
            with TapSession(unet, select(source.taps, (layer,))) as session:
                assert torch.equal(session.run(**given)[layer], together[layer])


def test_hooks_are_gone_after_any_error(unet: UNet2DConditionModel, source: ModelSource) -> None:
    taps = select(source.taps, source.presets["legacy"])
    given = inputs()
    with pytest.raises(RuntimeError, match=r"shape|match|size"), TapSession(unet, taps) as session:
        session.run(**given | {"sample": given["sample"][:, :3]})
    assert hooks(unet) == 0
    del unet.up_blocks[3].attentions[2]
    with pytest.raises(AttributeError), TapSession(unet, taps):
        pass
    assert hooks(unet) == 0


def test_a_pass_that_broke_off_leaves_nothing_in_the_next(unet: UNet2DConditionModel, source: ModelSource) -> None:
    taps = select(source.taps, ("attn-up-cross-2", "attn-up-cross-1"))
    given = inputs()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.inference_mode():
        with TapSession(unet, taps) as session:
            expected = session.run(**given)
        with TapSession(unet, taps) as session:
            handle = unet.up_blocks[2].resnets[1].register_forward_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                session.run(**given)
            handle.remove()
            again = session.run(**given)
    assert all(torch.equal(again[layer], expected[layer]) for layer in expected)
    assert hooks(unet) == 0


def test_a_forward_by_others_inside_a_session_is_left_alone(unet: UNet2DConditionModel, source: ModelSource) -> None:
    given = inputs()
    with torch.inference_mode(), TapSession(unet, select(source.taps, ("unet-after-conv-in",))) as session:
        whole = unet(given["sample"], given["timestep"], encoder_hidden_states=given["encoder_hidden_states"]).sample
        assert whole.shape == (2, 4, 16, 16)
        assert session.run(**given)["unet-after-conv-in"].shape == (2, 8, 16, 16)


def test_attention_maps_are_probabilities(unet: UNet2DConditionModel, source: ModelSource) -> None:
    names = [name for name in source.taps if name.endswith("-map") or name.startswith("attn-")]
    with torch.inference_mode(), TapSession(unet, select(source.taps, names)) as session:
        maps = session.run(**inputs())
    for name, value in maps.items():
        assert (value >= 0).all()
        torch.testing.assert_close(value.sum(1), torch.ones_like(value[:, 0]), rtol=1e-4, atol=1e-4, msg=name)


def test_a_layer_that_the_forward_does_not_pass_is_an_error(unet: UNet2DConditionModel, source: ModelSource) -> None:
    # A middle block that is there and never called: what a wrong declaration of layers would look like.
    middle, unet.mid_block.forward = unet.mid_block.forward, lambda hidden, *_, **__: hidden
    with (
        pytest.raises(RuntimeError, match="without passing mid-vit-out"),
        torch.inference_mode(),
        TapSession(unet, select(source.taps, ("mid-vit-out", "unet-in"))) as session,
    ):
        session.run(**inputs())
    unet.mid_block.forward = middle

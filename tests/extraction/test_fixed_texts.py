"""Keys and values of fixed prompts: computed once, whatever stands beside them, as if computed for each row."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from featstore import models
from featstore.extraction.fixed_texts import FixedTexts
from featstore.extraction.forward import Extractor
from featstore.extraction.passes import Pass
from featstore.models.backbones.base import Backbone
from featstore.techniques import SteeringOptions, parse, resolve
from tests.tiny_models import TextDataset

N = 2
B = 4
DIGESTS = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(N)]
LAYERS = ("up-level1-upsampler-out", "attn-up-cross-2", "unet-out")
EXPRESSION = "basic,prompt,prompt:caption,controlnet"


@pytest.fixture(scope="module")
def backbone(weights_root: Path) -> Backbone:
    return models.resolve("reference", weights_root=weights_root).load()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    data = TextDataset()
    return np.stack([data.image(str(n)) for n in range(N)])


def run(backbone: Backbone, images: np.ndarray, chosen: list[int]) -> dict[int, dict[str, np.ndarray]]:
    steerings = [
        resolve(one, dataset=TextDataset(), model=backbone.source, options=SteeringOptions())
        for one in parse(EXPRESSION)
    ]
    extractor = Extractor(backbone, steerings, LAYERS, batch_size=B, height_px=64, width_px=64, precision="float32")
    latents = extractor.encode(images)
    texts = ["a brown horse", "a grey horse"]
    passes = [
        Pass(
            steering=index,
            rows=np.arange(N),
            timestep=50,
            seed=0,
            captions=texts if extractor.steerings[index].prompt is None else None,
        )
        for index in chosen
    ]
    return {chosen[index]: maps.wait()[0] for index, maps in extractor.run_all(latents, images, DIGESTS, passes)}


def test_rows_do_not_depend_on_the_texts_beside_them(backbone: Backbone, images: np.ndarray) -> None:
    """Two rows of each pass: alone a batch holds one text, together two, or a text and captions."""
    together = run(backbone, images, [0, 1, 2, 3])
    mixed = run(backbone, images, [2, 0])
    for index in range(4):
        alone = run(backbone, images, [index])[index]
        for layer in LAYERS:
            np.testing.assert_array_equal(together[index][layer], alone[layer])
            if index in mixed:
                np.testing.assert_array_equal(mixed[index][layer], alone[layer])


def test_maps_are_those_of_a_forward_that_projects_every_row(
    backbone: Backbone, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = run(backbone, images, [0, 1, 2, 3])
    monkeypatch.setattr(FixedTexts, "__enter__", lambda self: self)
    plain = run(backbone, images, [0, 1, 2, 3])
    for index in range(4):
        for layer in LAYERS:
            for a, b in zip(shared[index][layer], plain[index][layer], strict=True):
                assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_a_fixed_text_is_projected_once_a_batch(backbone: Backbone) -> None:
    network, seen = backbone.denoiser, []
    attention = next(m for m in network.modules() if getattr(m, "is_cross_attention", False))
    handle = attention.to_k.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    words = torch.randn(1, 77, attention.to_k.in_features).expand(B, -1, -1)
    try:
        with torch.inference_mode(), FixedTexts([network]) as texts:
            expected = attention.to_k(words)
            texts.speak(words, ["a"] * B)
            assert attention.to_k(words).shape == expected.shape
            torch.testing.assert_close(attention.to_k(words), expected, rtol=1e-5, atol=1e-6)
            texts.speak(words, ["a", "a", None, "b"])
            torch.testing.assert_close(attention.to_k(words), expected, rtol=1e-5, atol=1e-6)
            other = torch.randn(2, 5, attention.to_k.in_features)
            assert torch.equal(attention.to_k(other), attention.to_k.forward(other))
    finally:
        handle.remove()
    assert seen == [B, 1, 1, B, 2]
    assert not attention.to_k._forward_hooks
    assert not attention.to_k._forward_pre_hooks

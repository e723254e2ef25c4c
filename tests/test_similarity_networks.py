"""Similarities to networks' eyes, with small random networks in the places of the real ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torchmetrics.functional.image.lpips import _LPIPS
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from featstore.errors import BadRequestError
from featstore.similarity_networks import FILES, available, load


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A weights root with all three."""
    root = tmp_path_factory.mktemp("weights")
    folder = root / "similarity"
    (folder / "lpips").mkdir(parents=True)
    torch.manual_seed(0)
    alexnet = torchvision.models.alexnet(weights=None)
    state = {name: value for name, value in alexnet.state_dict().items() if name.startswith("features.")}
    save_file(state, folder / "lpips" / "alexnet.safetensors")
    clip = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, projection_dim=12, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "clip")
    dino = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(dino).save_pretrained(folder / "dino")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder / "dino")
    return root


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)


def test_only_what_is_at_hand_is_there(root, tmp_path):
    assert available(root) == tuple(FILES)
    assert available(tmp_path) == ()
    (tmp_path / "similarity" / "dino").mkdir(parents=True)
    (tmp_path / "similarity" / "dino" / "config.json").write_text("{}")
    assert available(tmp_path) == ("dino",)


@pytest.mark.parametrize(("name", "equal"), [("lpips", 0.0), ("clip", 1.0), ("dino", 1.0)])
def test_equal_pictures_get_the_most_and_each_image_is_seen_alone(root, images, name, equal):
    measure = load(name, root=root)
    assert measure(images, images) == pytest.approx(np.full(3, equal), abs=1e-6)
    other = images[::-1].copy()
    found = measure(images, other)
    assert found.shape == (3,)
    assert abs(found[0] - equal) > 1e-5
    assert found[1] == pytest.approx(equal, abs=1e-6)
    assert measure(images[:1], other[:1]) == pytest.approx(found[:1], abs=1e-5)


def test_lpips_is_that_of_torchmetrics_with_these_weights(root, images):
    torch.manual_seed(0)
    alexnet = torchvision.models.alexnet(weights=None)
    own = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    numbers = [name for name, _ in own.net.named_parameters()]
    with torch.no_grad():
        for name, value in zip(numbers, alexnet.features.parameters(), strict=True):
            own.net.get_parameter(name).copy_(value)
        a, b = (
            torch.nn.functional.interpolate(
                torch.from_numpy(one.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1, size=64, mode="bilinear"
            )
            for one in (images, images[::-1])
        )
        expected = own(a, b).flatten().numpy()
    assert load("lpips", root=root)(images, images[::-1].copy()) == pytest.approx(expected, rel=1e-4)


def test_clip_is_the_cosine_of_its_embeddings(root, images):
    folder = root / "similarity" / "clip"
    network = CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    prepare = CLIPImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        embeds = network(**prepare(list(images), return_tensors="pt")).image_embeds
    expected = torch.nn.functional.cosine_similarity(embeds, embeds.flip(0)).numpy()
    assert load("clip", root=root)(images, images[::-1].copy()) == pytest.approx(expected, abs=1e-5)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "similarity" / "lpips").mkdir(parents=True)
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "similarity" / "lpips" / "alexnet.safetensors")
    with pytest.raises(BadRequestError, match=r"weights of lpips in .*similarity/lpips cannot be loaded"):
        load("lpips", root=tmp_path)

import numpy as np
import pytest
import torch
from torch.nn import functional

from featstore.errors import BadRequestError
from featstore.heads import BesideSpec, FeaturesSpec, PixelSpec, RunRef, load_head, read_head_json, save_head
from featstore.heads.stream import Maps
from featstore.heads.upernet import UPerNetHead, UPerNetHeadConfig

RUNS = (RunRef(name="basic", fingerprint="0" * 64), RunRef(name="prompt", fingerprint="1" * 64))
FEATURES = FeaturesSpec(
    layers={"coarse": (5, 2, 3), "fine": (4, 4, 6), "second": (3, 4, 6)},
    runs=RUNS,
    beside=(BesideSpec(run=RUNS[1], layers={"attn": (2, 4, 6), "wide": (6, 8, 8)}),),
)
SPEC = PixelSpec(features=FEATURES, classes=("a", "b", "c"), size=(10, 14))
CONFIG = UPerNetHeadConfig(width=6, pool_scales=(1, 2), assigner_hidden=4)


def head(config=CONFIG, spec=SPEC, seed=0):
    return UPerNetHead(spec, config, torch.Generator().manual_seed(seed))


def maps(images=3, spec=SPEC, seed=1):
    generator = torch.Generator().manual_seed(seed)
    count = len(spec.features.runs)
    layers = {n: torch.randn(images, count, *s, generator=generator) for n, s in spec.features.layers.items()}
    beside = {n: torch.randn(images, *s, generator=generator) for n, s in spec.features.beside_layers.items()}
    return Maps(rows=np.arange(images), layers=layers, beside=beside)


def test_levels_are_sizes_and_what_stands_beside_joins_its_own():
    made = head()
    assert made.levels == [["prompt/wide"], ["fine", "second", "prompt/attn"], ["coarse"]]
    # 6 beside; two assigners on 4 and 3 channels and 2 beside; two assigners on 5 channels
    assert [conv.conv.in_channels for conv in made.decoder.lateral_convs] == [6, 2 * 4 + 2 * 3 + 2]
    assert made.decoder.in_channels[-1] == 2 * 5


def block(x, module, padding=0):
    x = functional.conv2d(x, module.conv.weight, padding=padding)
    norm = module.batch_norm
    x = functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return torch.relu(x)


def resized(x, like):
    return functional.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def test_predictions_equal_the_published_network_written_out():
    made, given = head(), maps()
    fit(made)
    net = made.decoder
    layers, beside = made.standardise(given)
    mixed = made.amalgamation(layers).layers
    wide = beside["prompt/wide"]
    middle = torch.cat([mixed["fine"], mixed["second"], beside["prompt/attn"]], 1)
    coarse = mixed["coarse"]
    pooled = [
        resized(block(functional.adaptive_avg_pool2d(coarse, side), psp.layers[1]), coarse)
        for side, psp in zip((1, 2), net.psp_modules.blocks, strict=True)
    ]
    top = block(torch.cat([coarse, *pooled], 1), net.bottleneck, 1)
    down = block(middle, net.lateral_convs[1])
    down = down + resized(top, down)
    fine = block(wide, net.lateral_convs[0])
    fine = fine + resized(down, fine)
    levels = [block(fine, net.fpn_convs[0], 1), block(down, net.fpn_convs[1], 1), top]
    fused = block(torch.cat([resized(level, fine) for level in levels], 1), net.fpn_bottleneck, 1)
    scores = functional.conv2d(fused, net.classifier.weight, net.classifier.bias)
    whole = functional.interpolate(scores, (10, 14), mode="bilinear", align_corners=False)
    logits, weights = made.logits(given)
    torch.testing.assert_close(logits, whole)
    assert set(weights) == {"coarse", "fine", "second"}
    said = made.predict_maps(given)
    probabilities = whole.detach().softmax(1).double().numpy()
    np.testing.assert_array_equal(said.labels, probabilities.argmax(1))
    np.testing.assert_allclose(said.uncertainty, -(probabilities * np.log(probabilities)).sum(1), atol=1e-5)
    assert said.labels.dtype == np.uint8
    assert said.labels.shape == said.uncertainty.shape == (3, 10, 14)


def fit(made):
    """Statistics far from neutral, of channels and of batch norms."""
    made.standardise.fit([maps(seed=5)])
    generator = torch.Generator().manual_seed(2)
    for name, value in made.decoder.state_dict().items():
        if "running_var" in name:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.3)
        elif "batch_norm" in name and value.ndim:
            value.copy_(torch.randn(value.shape, generator=generator))


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_loaded_head_predicts_bit_for_bit_the_same(tmp_path, runs, per_channel):
    spec = PixelSpec(
        features=FeaturesSpec(layers=FEATURES.layers, runs=RUNS[:runs]), classes=SPEC.classes, size=SPEC.size
    )
    config = UPerNetHeadConfig(width=6, pool_scales=(1, 2), per_channel=per_channel, lovasz=0.5)
    made, given = head(config, spec, seed=3), maps(spec=spec)
    made.standardise.fit([given])
    loaded = load_head(save_head(tmp_path, made, metrics={"miou": 0.5}))
    assert isinstance(loaded, UPerNetHead)
    assert loaded.spec == spec
    assert loaded.config == config
    assert read_head_json(tmp_path)["kind"] == "upernet"
    before, after = made.predict_maps(given), loaded.predict_maps(given)
    np.testing.assert_array_equal(before.labels, after.labels)
    np.testing.assert_array_equal(before.uncertainty, after.uncertainty)
    assert all(torch.equal(value, after.weights[name]) for name, value in before.weights.items())
    assert len(after.weights) == (3 if runs > 1 else 0)


def test_initial_parameters_come_from_the_generator_alone():
    torch.manual_seed(1)
    first = head(seed=5).tensors()
    torch.manual_seed(2)
    again, other = head(seed=5).tensors(), head(seed=6).tensors()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["decoder.classifier.weight"], other["decoder.classifier.weight"])


def test_its_width_is_the_papers_where_the_features_are_as_wide():
    wide = FeaturesSpec(layers={"a": (1280, 2, 2), "b": (320, 4, 4)}, runs=RUNS)
    assert UPerNetHeadConfig().width_for(wide) == 512
    assert UPerNetHeadConfig().width_for(FEATURES) == 5
    assert UPerNetHeadConfig(width=7).width_for(wide) == 7


@pytest.mark.parametrize(
    "change",
    [
        {"assigners": 0},
        {"batch_size": 1},
        {"max_steps": 0},
        {"width": 0},
        {"pool_scales": ()},
        {"pool_scales": (1, 0)},
        {"learning_rate": 0.0},
        {"lovasz": -1.0},
        {"gamma1": float("nan")},
        {"decay_power": float("inf")},
    ],
)
def test_impossible_configurations_are_refused_with_the_value(change):
    with pytest.raises(BadRequestError, match=next(iter(change))):
        UPerNetHeadConfig(**change)

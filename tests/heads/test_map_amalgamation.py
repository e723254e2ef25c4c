import dask.array as da
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from featstore.errors import BadRequestError
from featstore.heads import Beside, Features, RunRef
from featstore.heads.initial import draw_parameters
from featstore.heads.map_amalgamation import MapAmalgamation, MapWeights, amalgamate, regulariser
from featstore.heads.map_standardise import MapStandardise
from featstore.heads.stream import Stream, read_maps

SHAPES = {"up.coarse": (5, 3, 4), "fine": (3, 6, 8)}


def module(*, runs=3, assigners=2, per_channel=False, hidden=4, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return MapAmalgamation(
        shapes, runs=runs, assigners=assigners, per_channel=per_channel, hidden=hidden, generator=generator
    )


def maps(*, runs=3, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, runs, *shape, generator=generator) for name, shape in SHAPES.items()}


def one_assigner(part, number, hidden, outputs):
    """One assigner of one layer, out of layers of its own."""
    mine = slice(number * hidden, (number + 1) * hidden)
    last = slice(number * outputs, (number + 1) * outputs)

    def run(x):
        h = torch.relu(functional.conv2d(x, part.hidden.weight[mine], part.hidden.bias[mine], padding=1))
        spread, mean = torch.var_mean(h, (1, 2, 3), correction=0, keepdim=True)
        h = (h - mean) / (spread + 1e-5).sqrt()
        h = h * part.norm.weight[mine, None, None] + part.norm.bias[mine, None, None]
        return functional.conv2d(h, part.scores.weight[last], part.scores.bias[last])

    return run


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("assigners", [1, 2, 3, 4, 6])
def test_every_layer_is_weighed_and_mixed_at_its_own_size_as_a_loop_does_it(assigners, per_channel):
    net, given = module(assigners=assigners, per_channel=per_channel), maps()
    result = net(given)
    for part, (name, (channels, height, width)) in zip(net.layers, SHAPES.items(), strict=True):
        x, own = given[name], channels if per_channel else 1
        assert result.weights[name].shape == (2, assigners, 3, own, height, width)
        for number in range(assigners):
            scores = one_assigner(part, number, 4, 3 * own)(x.flatten(1, 2)).view(2, 3, own, height, width)
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            torch.testing.assert_close(result.weights[name][:, number], weights)
            expected = sum(weights[:, k] * x[:, k] for k in range(3))
            mine = result.layers[name][:, number * channels : (number + 1) * channels]
            torch.testing.assert_close(mine, expected)
        assert net.channels(name) == result.layers[name].shape[1] == assigners * channels


def test_a_single_run_passes_through_without_assigners():
    net, given = module(runs=1), maps(runs=1)
    result = net(given)
    assert not list(net.parameters())
    assert result.weights == {}
    assert net.channels("fine") == 3
    for name in SHAPES:
        torch.testing.assert_close(result.layers[name], given[name][:, 0], rtol=0, atol=0)
    assert regulariser(result.weights, 1.0, 1.0) == 0
    readout = MapWeights()
    readout.update(result.weights)
    assert readout.to_json() == {}


def test_what_an_image_gets_does_not_depend_on_its_batch_or_on_training():
    net, given = module(), maps(batch=5)
    together = net.train()(given).layers
    alone = net.eval()({name: value[3:4] for name, value in given.items()}).layers
    for name in SHAPES:
        torch.testing.assert_close(together[name][3:4], alone[name])


def test_gradients_reach_every_assigner_and_training_moves_the_weight_to_a_wanted_run():
    torch.manual_seed(0)
    net, given = module(assigners=2), maps(batch=4)
    adam = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        result = net(given)
        loss = sum(
            (result.layers[name].unflatten(1, (2, -1)) - given[name][:, None, 1]).square().mean() for name in SHAPES
        )
        adam.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
        adam.step()
    readout = MapWeights()
    readout.update(net(given).weights)
    for value in readout.by_layer().values():
        assert value.argmax(1).tolist() == [1, 1]
        assert value[:, 1].min() > 0.7


def test_initial_parameters_come_from_the_generator_alone():
    torch.manual_seed(1)
    first = module(seed=5).state_dict()
    torch.manual_seed(2)
    again, other = module(seed=5).state_dict(), module(seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.hidden.weight"], other["layers.0.hidden.weight"])


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(6, 4, 3, groups=2), lambda: nn.Linear(5, 3)])
def test_parameters_are_drawn_as_torch_draws_them(make):
    torch.manual_seed(11)
    expected = make()
    mine = make()
    draw_parameters(nn.Sequential(mine), torch.Generator().manual_seed(11))
    assert torch.equal(mine.weight, expected.weight)
    assert torch.equal(mine.bias, expected.bias)


def test_the_regulariser_is_the_mean_over_layers_positions_and_channels_of_the_formula():
    weights = module(assigners=3, per_channel=True)(maps()).weights
    layers = []
    for value in weights.values():  # (B, n, K, C, H, W)
        w = value.detach().double().movedim(2, -1)  # (B, n, C, H, W, K)
        sparse = torch.linalg.vector_norm(w, dim=-1).sum(1)
        apart = sum(torch.linalg.vector_norm(w[:, j] - w[:, k], dim=-1) for j in range(3) for k in range(3) if j != k)
        layers.append((-0.3 * sparse - 0.7 / 2 * apart).mean())
    expected = (layers[0] + layers[1]) / 2
    assert regulariser(weights, 0.3, 0.7).item() == pytest.approx(expected.item(), abs=1e-5)


def test_mixing_worked_by_hand():
    values = torch.tensor([[[[[1.0, 2.0]]], [[[10.0, 20.0]]]]])  # (1, K=2, C=1, H=1, W=2)
    weights = torch.tensor([[[[[[0.5, 0.0]]], [[[0.5, 1.0]]]], [[[[1.0, 0.25]]], [[[0.0, 0.75]]]]]])  # (1, n=2, K, ..)
    assert amalgamate(values, weights).tolist() == [[[[5.5, 20.0]], [[1.0, 15.5]]]]


def test_the_readout_is_the_mean_over_all_images_whatever_the_batches():
    net, given = module(assigners=2, per_channel=True), maps(batch=5)
    whole = net(given).weights
    readout = MapWeights()
    for part in (slice(0, 3), slice(3, 5)):
        readout.update(net({name: value[part] for name, value in given.items()}).weights)
    for name, value in readout.by_layer().items():
        np.testing.assert_allclose(value, whole[name].detach().mean((0, 3, 4, 5)).numpy(), atol=1e-6)
        np.testing.assert_allclose(value.sum(1), 1, atol=1e-6)
    assert np.array(readout.to_json()["fine"]).shape == (2, 3)


@pytest.mark.parametrize("change", [{"runs": 0}, {"assigners": 0}, {"hidden": 0}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(BadRequestError, match="amalgamation needs 1 run or more"):
        module(**change)


def test_maps_that_do_not_fit_are_refused_by_name():
    net, given = module(), maps()
    with pytest.raises(BadRequestError, match=r"needs layer 'fine'; given: up\.coarse$"):
        net({"up.coarse": given["up.coarse"]})
    with pytest.raises(BadRequestError, match=r"'fine' is \(2, 3, 6, 8\) an image, the head needs \(3, 3, 6, 8\)"):
        net({**given, "fine": given["fine"][:, :2]})


def features(images=11, dtype=np.float16):
    rng = np.random.default_rng(0)

    def lazy(offset, shape):
        values = (offset + rng.standard_normal((images, *shape)) * (1 + offset)).astype(dtype)
        values[:, 0] = offset  # a constant channel
        return da.from_array(values, chunks=(4, *shape))

    return Features(
        maps=[{name: lazy(20.0 * k, shape) for name, shape in SHAPES.items()} for k in range(3)],
        beside=[Beside(run=RunRef(name="other"), layers={"attn": lazy(3.0, (2, 3, 3))})],
    )


def test_maps_are_standardised_by_run_layer_and_channel_as_numpy_does_it():
    given = features()
    rows = [0, 2, 3, 7, 8, 10]
    standardise = MapStandardise(given.spec())
    standardise.fit(Stream(features=given, rows=rows, batch=2, window_bytes=1).epoch(0))
    layers, beside = standardise(read_maps(given, rows))
    for name in SHAPES:
        for k in range(3):
            raw = given.maps[k][name].compute()[rows].astype(np.float64)
            mean, deviation = raw.mean((0, 2, 3), keepdims=True), raw.std((0, 2, 3), keepdims=True)
            expected = np.where(deviation > 0, (raw - mean) / np.where(deviation > 0, deviation, 1), 0)
            np.testing.assert_allclose(layers[name][:, k].numpy(), expected, atol=1e-4)
    raw = given.beside[0].layers["attn"].compute()[rows].astype(np.float64)
    expected = (raw[:, 1] - raw[:, 1].mean()) / raw[:, 1].std()
    np.testing.assert_allclose(beside["other/attn"][:, 1].numpy(), expected, atol=1e-4)
    assert not beside["other/attn"][:, 0].any()


def test_statistics_survive_saving_and_do_not_depend_on_the_batches():
    given = features(dtype=np.float32)
    first, second = MapStandardise(given.spec()), MapStandardise(given.spec())
    first.fit([read_maps(given, range(11))])
    second.fit(Stream(features=given, rows=range(11), batch=3, seed=4).epoch(0))
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[name], rtol=1e-6, atol=1e-6)
    loaded = MapStandardise(given.spec())
    loaded.load_state_dict(first.state_dict())
    maps = read_maps(given, [4])
    assert torch.equal(loaded(maps)[0]["fine"], first(maps)[0]["fine"])


def test_no_maps_give_no_statistics():
    with pytest.raises(BadRequestError, match="no maps"):
        MapStandardise(features().spec()).fit([])

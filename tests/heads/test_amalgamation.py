import math

import numpy as np
import pytest
import torch
from torch import nn

from featstore.errors import BadRequestError
from featstore.heads import PixelHeadConfig, load_head, save_head, train_segmentation
from featstore.heads.amalgamation import PixelAssigners, amalgamate, regulariser, run_weights
from featstore.heads.pixels import member_generator
from tests.heads import planted


def assigners(members=3, runs=4, channels=5, count=2, hidden=6, **more):
    generators = [member_generator(7, m) for m in range(members)]
    return PixelAssigners(runs=runs, channels=channels, assigners=count, hidden=hidden, generators=generators, **more)


def plain(module, member, number, runs, channels, hidden):
    """One assigner of one member, out of torch's own layers."""
    part = slice(number * hidden, (number + 1) * hidden)
    first, second = nn.Linear(runs * channels, hidden), nn.Linear(hidden, runs)
    with torch.no_grad():
        first.weight.copy_(module.hidden.weight0[member, :, part].T)
        first.bias.copy_(module.hidden.bias[member, 0, part])
        second.weight.copy_(module.scores.weight[member, number])
        second.bias.copy_(module.scores.bias[member, number, :, 0])
    return nn.Sequential(first, nn.ReLU(), nn.BatchNorm1d(hidden), second, nn.Softmax(1))


def test_assigners_and_mixing_equal_plain_networks_one_by_one():
    module = assigners()
    runs = torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(0))
    weights = module(runs)
    mixed = amalgamate(runs, weights)
    assert weights.shape == (3, 2, 4, 8)
    assert mixed.shape == (3, 8, 10)
    for member in range(3):
        for number in range(2):
            network = plain(module, member, number, 4, 5, 6)
            expected = network(runs[member].flatten(1))  # (P, K)
            torch.testing.assert_close(weights[member, number].T, expected)
            total = sum(expected[:, k, None] * runs[member, :, k] for k in range(4))
            torch.testing.assert_close(mixed[member, :, number * 5 : (number + 1) * 5], total)


@pytest.mark.parametrize("count", [1, 3])
def test_assigners_per_channel_equal_plain_networks_one_by_one(count):
    module = assigners(count=count, per_channel=True)
    runs = torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(0))
    weights = module(runs)
    mixed = amalgamate(runs, weights)
    assert weights.shape == (3, count, 4, 5, 8)
    assert mixed.shape == (3, 8, count * 5)
    for member in range(3):
        for number in range(count):
            part = slice(number * 6, (number + 1) * 6)
            first, second = nn.Linear(20, 6), nn.Linear(6, 20)
            with torch.no_grad():
                first.weight.copy_(module.hidden.weight0[member, :, part].T)
                first.bias.copy_(module.hidden.bias[member, 0, part])
                second.weight.copy_(module.scores.weight[member, number].T)
                second.bias.copy_(module.scores.bias[member, number, 0])
            scores = nn.Sequential(first, nn.ReLU(), nn.BatchNorm1d(6), second)(runs[member].flatten(1))
            for channel in range(5):
                expected = torch.softmax(scores.view(8, 4, 5)[:, :, channel], 1)  # (P, K)
                torch.testing.assert_close(weights[member, number, :, channel].T, expected)
                total = (expected * runs[member, :, :, channel]).sum(1)
                torch.testing.assert_close(mixed[member, :, number * 5 + channel], total)


def test_equal_weights_of_all_channels_are_a_scalar_weight():
    scalar = torch.softmax(torch.randn(2, 3, 4, 7, generator=torch.Generator().manual_seed(2)), 2)
    apart = scalar.unsqueeze(3).expand(2, 3, 4, 5, 7)
    runs = torch.randn(2, 7, 4, 5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(amalgamate(runs, apart), amalgamate(runs, scalar))
    torch.testing.assert_close(regulariser(apart, 0.3, 0.7), regulariser(scalar, 0.3, 0.7))
    torch.testing.assert_close(run_weights(apart), run_weights(scalar))
    assert run_weights(scalar) is scalar


def test_the_regulariser_per_channel_is_the_mean_over_channels():
    weights = assigners(per_channel=True)(torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(5)))
    channels = [regulariser(weights[:, :, :, c], 0.3, 0.7) for c in range(5)]
    torch.testing.assert_close(regulariser(weights, 0.3, 0.7), torch.stack(channels).mean(0))
    assert channels[0].sub(channels[1]).abs().max() > 1e-4


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_sum_to_one_and_are_positive(per_channel):
    module = assigners(members=2, runs=3, per_channel=per_channel)
    weights = module(10 * torch.randn(2, 20, 3, 5, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(weights.sum(2), torch.ones(weights[:, :, 0].shape))
    assert weights.min() >= 0
    assert weights.std() > 0.01  # and not simply equal


@pytest.mark.parametrize("change", [{"runs": 1}, {"count": 0}, {"hidden": 0}])
def test_impossible_assigners_are_refused(change):
    with pytest.raises(BadRequestError, match="amalgamation needs"):
        assigners(**change)


def test_the_regulariser_of_two_assigners_worked_by_hand():
    # pixel 1: assigner 1 takes run 1, assigner 2 takes run 2: norms 1 and 1, distance sqrt(2), counted twice
    # pixel 2: both take halves: norms sqrt(1/2) each, distance 0
    weights = torch.tensor([[[[1.0, 0.5], [0.0, 0.5]], [[0.0, 0.5], [1.0, 0.5]]]])  # (1, n, K, P)
    sparsity = (2 + 2 * math.sqrt(0.5)) / 2
    diversity = (2 * math.sqrt(2) + 0) / 2
    assert regulariser(weights, 0.3, 0.0).item() == pytest.approx(-0.3 * sparsity, abs=1e-5)
    assert regulariser(weights, 0.0, 0.4).item() == pytest.approx(-0.2 * diversity, abs=1e-5)
    assert regulariser(weights, 0.3, 0.4).item() == pytest.approx(-0.3 * sparsity - 0.2 * diversity, abs=1e-5)


def test_the_regulariser_of_three_assigners_counts_every_ordered_pair():
    w = torch.softmax(torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(3)), 2).double()
    for member in range(2):
        total = 0.0
        for p in range(5):
            for j in range(3):
                total -= 0.1 * math.sqrt(sum(w[member, j, k, p].item() ** 2 for k in range(4)))
                for other in set(range(3)) - {j}:
                    total -= 0.35 * math.dist(w[member, j, :, p].tolist(), w[member, other, :, p].tolist())
        assert regulariser(w, 0.1, 0.7)[member].item() == pytest.approx(total / 5, abs=1e-5)


def test_assigners_that_agree_have_finite_gradients():
    weights = torch.full((1, 2, 3, 4), 1 / 3, requires_grad=True)
    regulariser(weights, 1.0, 1.0).sum().backward()
    assert torch.isfinite(weights.grad).all()


def test_one_assigner_has_no_diversity_term():
    weights = torch.tensor([[[[0.6], [0.8]]]])
    assert regulariser(weights, 1.0, 5.0).item() == pytest.approx(-1.0, abs=1e-5)


def test_a_head_with_weights_per_channel_finds_the_signal_reads_out_runs_and_survives_saving(tmp_path):
    config = PixelHeadConfig(members=2, assigners=2, per_channel=True, max_steps=250, learning_rate=3e-3)
    task = planted.task()
    result = train_segmentation(task, config, seed=1)
    assert result.metrics["miou"] > 0.6
    assert result.weights.shape == (2, 2, 3)  # by member, assigner and run: the mean over channels
    np.testing.assert_allclose(result.weights.sum(2), 1, atol=1e-5)
    assert result.weights.mean((0, 1)).argmax() == planted.SIGNAL_RUN
    loaded = load_head(save_head(tmp_path, result.head))
    assert loaded.config.per_channel
    assert all(torch.equal(value, loaded.tensors()[name]) for name, value in result.head.tensors().items())

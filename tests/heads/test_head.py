import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch.nn import functional

from featstore.errors import BadRequestError, IncompatibleError
from featstore.heads import BesideSpec, FeaturesSpec, PixelHead, PixelHeadConfig, PixelSpec, RunRef
from featstore.heads import head as head_module
from featstore.heads.pixels import jensen_shannon, majority_vote, member_generator

PROMPT = RunRef(name="prompt", fingerprint="1" * 64)
FEATURES = FeaturesSpec(
    layers={"coarse": (3, 2, 2), "fine": (2, 5, 4)},
    runs=(RunRef(name="basic", fingerprint="0" * 64), PROMPT),
    beside=(BesideSpec(run=PROMPT, layers={"attn": (4, 3, 3)}),),
)
SPEC = PixelSpec(features=FEATURES, classes=("a", "b", "c", "d"), size=(9, 7))
CONFIG = PixelHeadConfig(members=3, assigners=2, assigner_hidden=5, hidden=(6, 5))


def head(spec=SPEC, config=CONFIG):
    """An untrained head whose statistics are far from neutral."""
    generator = torch.Generator().manual_seed(0)
    made = PixelHead.untrained(spec, config, [member_generator(3, m) for m in range(config.members)])
    runs, channels, attention = len(spec.features.runs), spec.features.channels, spec.features.beside_channels
    for name, value in made.members.state_dict().items():
        if "running_var" in name:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.2)
        elif "running" in name or "norm" in name:
            value.copy_(torch.randn(value.shape, generator=generator))
        elif name == "linear3.weight":
            value.mul_(6)  # members that are sure of themselves, so that they disagree
    mean = torch.randn(runs, channels, generator=generator), torch.rand(runs, channels, generator=generator) + 0.5
    attended = torch.randn(attention, generator=generator), torch.rand(attention, generator=generator) + 0.5
    made.standardise.fit(mean, attended)
    return made


def features(images=3, spec=FEATURES):
    generator = torch.Generator().manual_seed(8)
    maps = [{n: torch.randn(images, *s, generator=generator) for n, s in spec.layers.items()} for _ in spec.runs]
    return maps, {n: torch.randn(images, *s, generator=generator) for n, s in spec.beside_layers.items()}


def slowly(trained, maps, attention):
    """Probabilities (M, B, classes, h, w) and weights (M, n, K, B, h, w) by upsampling everything first."""

    def whole(layers):
        return torch.cat(
            [functional.interpolate(m, SPEC.size, mode="bilinear", align_corners=False) for m in layers], 1
        )

    def normal(x, norm, m, part=slice(None)):
        view = (1, -1, 1, 1)
        mean, var = norm.running_mean[m][part].view(view), norm.running_var[m][part].view(view)
        return (x - mean) / (var + 1e-5).sqrt() * norm.weight[m][part].view(view) + norm.bias[m][part].view(view)

    def linear(x, weight, bias):  # weight (I, O)
        return torch.einsum("bihw,io->bohw", x, weight) + bias.view(1, -1, 1, 1)

    stats, members = trained.standardise, trained.members
    runs = [
        (whole(layers.values()) - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
        for layers, mean, scale in zip(maps, stats.run_mean, stats.run_scale, strict=True)
    ]
    attended = whole(attention.values()) - stats.attention_mean.view(1, -1, 1, 1)
    attended = attended * stats.attention_scale.view(1, -1, 1, 1)
    probabilities, chosen = [], []
    for m in range(3):
        mixed, weights = [], []
        for j in range(2):
            part = slice(5 * j, 5 * j + 5)
            first = members.assigners.hidden
            hidden = torch.relu(linear(torch.cat(runs, 1), first.weight0[m, :, part], first.bias[m, 0, part]))
            scores = members.assigners.scores
            w = linear(normal(hidden, members.assigners.norm, m, part), scores.weight[m, j].T, scores.bias[m, j])
            w = w.softmax(1)
            weights.append(w.transpose(0, 1))
            mixed.append(sum(w[:, k : k + 1] * runs[k] for k in range(2)))
        x = torch.cat([*mixed, attended], 1)
        matrix = torch.cat([members.linear1.weight0[m], members.linear1.weight1[m]])
        x = normal(torch.relu(linear(x, matrix, members.linear1.bias[m])), members.norm1, m)
        x = normal(torch.relu(linear(x, members.linear2.weight[m].T, members.linear2.bias[m])), members.norm2, m)
        probabilities.append(linear(x, members.linear3.weight[m].T, members.linear3.bias[m]).softmax(1))
        chosen.append(torch.stack(weights))
    return torch.stack(probabilities).detach(), torch.stack(chosen).detach()


@pytest.mark.parametrize("chunk_bytes", [head_module._CHUNK_BYTES, 1])
def test_predictions_equal_upsampling_first_and_one_network_after_another(monkeypatch, chunk_bytes):
    monkeypatch.setattr(head_module, "_CHUNK_BYTES", chunk_bytes)  # 189 pixels at once; the least is 256
    maps, attention = features(images=9)
    trained = head()
    said = trained.predict(maps, attention)
    probabilities, weights = slowly(trained, maps, attention)
    np.testing.assert_array_equal(said.member_labels, probabilities.argmax(2))
    assert len(np.unique(said.labels)) > 1
    assert (said.member_labels[0] != said.member_labels[1]).any()
    entropy = torch.special.entr(probabilities.mean(0)).sum(1) - torch.special.entr(probabilities).sum(2).mean(0)
    np.testing.assert_allclose(said.uncertainty, entropy, atol=1e-5)
    for place in np.ndindex(*said.labels.shape):
        votes = np.bincount(said.member_labels[(slice(None), *place)], minlength=4)
        assert votes[said.labels[place]] == votes.max()
    np.testing.assert_allclose(said.weights, weights.mean((0, 1)).transpose(0, 1), atol=1e-5)
    np.testing.assert_allclose(said.assigner_weights, weights.mean((3, 4, 5)), atol=1e-5)


def test_a_tie_goes_to_the_more_probable_class_and_a_majority_is_never_overruled():
    tie = torch.tensor([[[0.9], [0.1], [0.0]], [[0.4], [0.6], [0.0]]])
    assert majority_vote(tie).tolist() == [0]
    assert majority_vote(tie[:, [1, 0, 2]]).tolist() == [1]
    # two of three say class 2, each barely; the third is certain of class 0
    minority = torch.tensor([[[1.0], [0.0], [0.0]], [[0.49], [0.0], [0.51]], [[0.49], [0.0], [0.51]]])
    assert majority_vote(minority).tolist() == [2]


def test_jensen_shannon_equals_scipys_squared_distance_of_two_members():
    p = torch.softmax(2 * torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0)), 1)
    expected = jensenshannon(p[0].numpy(), p[1].numpy(), axis=0) ** 2
    np.testing.assert_allclose(jensen_shannon(p).numpy(), expected, atol=1e-6)


def test_jensen_shannon_lies_between_agreement_and_the_logarithm_of_the_members():
    same = torch.softmax(torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0)), 1).expand(3, 4, 9)
    assert jensen_shannon(same).abs().max() < 1e-6
    apart = torch.eye(4)[:3].unsqueeze(2)  # three members, each certain of another class
    assert jensen_shannon(apart).item() == pytest.approx(math.log(3))


def test_taking_and_putting_members_back_copies():
    members = head().members
    taken = members.take([2, 0])
    assert taken.members == 2
    before = {name: value.clone() for name, value in members.state_dict().items()}
    with torch.no_grad():
        for value in taken.state_dict().values():
            value.add_(1)
    for name, value in members.state_dict().items():
        assert torch.equal(value, before[name]), "take must not share memory"
    members.put([2], taken, [0])
    for name, value in members.state_dict().items():
        assert torch.equal(value[2], before[name][2] + 1)
        assert torch.equal(value[:2], before[name][:2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda maps, attention: maps.pop(), "2 runs, not of 1"),
        (lambda maps, attention: maps[1].pop("fine"), "needs layer 'fine'; given: coarse"),
        (lambda maps, attention: attention.clear(), "needs layer 'prompt/attn'; given: none"),
        (lambda maps, attention: maps[0].update(fine=maps[0]["fine"][:, :, :3]), r"\(3, 2, 3, 4\), the head needs"),
        (lambda maps, attention: maps[1].update(fine=maps[1]["fine"][:2]), r"needs \(3, 2, 5, 4\)"),
    ],
)
def test_features_that_do_not_fit_are_refused(spoil, message):
    maps, attention = features()
    spoil(maps, attention)
    with pytest.raises(BadRequestError, match=message):
        head().predict(maps, attention)


def test_runs_with_other_fingerprints_are_refused():
    FEATURES.check_runs(FEATURES.runs, [PROMPT])
    other = RunRef(name="prompt", fingerprint="2" * 64)
    with pytest.raises(IncompatibleError, match="'prompt' has fingerprint 2222"):
        FEATURES.check_runs((FEATURES.runs[0], other), [PROMPT])
    with pytest.raises(IncompatibleError, match="fingerprint 2222"):
        FEATURES.check_runs(FEATURES.runs, [other])
    with pytest.raises(IncompatibleError, match="2 runs, not on 1"):
        FEATURES.check_runs(FEATURES.runs[:1], [PROMPT])
    with pytest.raises(IncompatibleError, match="1 runs beside them, not on 0"):
        FEATURES.check_runs(FEATURES.runs)


def test_a_specification_survives_json():
    assert FeaturesSpec.from_json(FEATURES.to_json()) == FEATURES
    assert list(FeaturesSpec.from_json(FEATURES.to_json()).layers) == ["coarse", "fine"]
    assert (FEATURES.channels, FEATURES.beside_channels) == (5, 4)

"""Batched training against members trained one after another out of torch's own layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from featstore.errors import BadRequestError
from featstore.heads import training
from featstore.heads.pixels import PixelHeadConfig, PixelMembers, member_generator
from featstore.heads.standardise import Standardise
from featstore.heads.tables import PixelTables
from featstore.heads.training import member_losses, train_members

RUNS, CHANNELS, ATTENTION, CLASSES = 3, 4, 2, 5
CONFIG = PixelHeadConfig(members=3, assigners=2, assigner_hidden=6, hidden=(8, 7), gamma1=0.1, gamma2=0.2)


def build(config=CONFIG, runs=RUNS, attention=ATTENTION, members=None):
    generators = [member_generator(5, m) for m in (range(config.members) if members is None else members)]
    module = PixelMembers(
        config, runs=runs, channels=CHANNELS, attention=attention, classes=CLASSES, generators=generators
    )
    return module, generators


class Plain(nn.Module):
    """One member as the paper describes it, of plain layers, with the parameters of a batched member."""

    def __init__(self, batched, m):
        super().__init__()
        width, hidden = RUNS * CHANNELS, CONFIG.assigner_hidden
        self.first = nn.ModuleList(nn.Linear(width, hidden) for _ in range(CONFIG.assigners))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(CONFIG.assigners))
        self.second = nn.ModuleList(nn.Linear(hidden, RUNS) for _ in range(CONFIG.assigners))
        mixed = CONFIG.assigners * CHANNELS
        self.mlp = nn.Sequential(
            nn.Linear(mixed + ATTENTION, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 7), nn.ReLU(), nn.BatchNorm1d(7)
        )
        self.last = nn.Linear(7, CLASSES)
        with torch.no_grad():
            for j in range(CONFIG.assigners):
                part = slice(j * hidden, (j + 1) * hidden)
                self.first[j].weight.copy_(batched.assigners.hidden.weight0[m, :, part].T)
                self.first[j].bias.copy_(batched.assigners.hidden.bias[m, 0, part])
                self.second[j].weight.copy_(batched.assigners.scores.weight[m, j])
                self.second[j].bias.copy_(batched.assigners.scores.bias[m, j, :, 0])
            self.mlp[0].weight.copy_(torch.cat([batched.linear1.weight0[m], batched.linear1.weight1[m]]).T)
            self.mlp[0].bias.copy_(batched.linear1.bias[m, 0])
            for mine, theirs in ((self.mlp[3], batched.linear2), (self.last, batched.linear3)):
                mine.weight.copy_(theirs.weight[m])
                mine.bias.copy_(theirs.bias[m, :, 0])

    def objective(self, runs, attention, labels):
        weights = [
            second(norm(torch.relu(first(runs.flatten(1))))).softmax(1)
            for first, norm, second in zip(self.first, self.norms, self.second, strict=True)
        ]
        mixed = [(w[:, :, None] * runs).sum(1) for w in weights]
        logits = self.last(self.mlp(torch.cat([*mixed, attention], 1)))
        sparsity = sum(torch.linalg.vector_norm(w, dim=1) for w in weights).mean()
        pair = torch.linalg.vector_norm(weights[0] - weights[1], dim=1).mean()  # twice, times one half
        return functional.cross_entropy(logits, labels) - CONFIG.gamma1 * sparsity - CONFIG.gamma2 * pair


def batches(steps, pixels=16):
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        yield (
            torch.randn(3, pixels, RUNS, CHANNELS, generator=generator).double(),
            torch.randn(3, pixels, ATTENTION, generator=generator).double(),
            torch.randint(0, CLASSES, (3, pixels), generator=generator),
        )


def one_step(module, optimiser, batch):
    optimiser.zero_grad()
    _, objective = member_losses(module, *batch, CONFIG)
    objective.sum().backward()
    optimiser.step()


def test_batched_steps_equal_members_trained_one_by_one():
    # float64, so that what is compared is the computation and not the rounding that Adam amplifies
    batched = build()[0].double().train()
    plain = [Plain(batched, m).double().train() for m in range(3)]
    together = torch.optim.Adam(batched.parameters(), lr=1e-3, fused=True)
    alone = [torch.optim.Adam(p.parameters(), lr=1e-3) for p in plain]
    for runs, attention, labels in batches(4):
        one_step(batched, together, (runs, attention, labels))
        for m in range(3):
            alone[m].zero_grad()
            plain[m].objective(runs[m], attention[m], labels[m]).backward()
            alone[m].step()
    for m in range(3):
        after = Plain(batched, m).double()
        for (name, mine), theirs in zip(after.named_parameters(), plain[m].parameters(), strict=True):
            if "norm" not in name and not name.startswith(("mlp.2", "mlp.5")):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5, msg=name)
        torch.testing.assert_close(batched.norm1.running_mean[m], plain[m].mlp[2].running_mean)
        torch.testing.assert_close(batched.norm2.running_var[m], plain[m].mlp[5].running_var)
        torch.testing.assert_close(batched.norm2.weight[m], plain[m].mlp[5].weight)
        torch.testing.assert_close(batched.assigners.norm.weight[m], torch.cat([n.weight for n in plain[m].norms]))


def test_float32_gradients_of_all_members_equal_those_of_each():
    batch = [t.float() if t.is_floating_point() else t for t in next(batches(1))]
    together, _ = build()
    member_losses(together.train(), *batch, CONFIG)[1].sum().backward()
    for m in range(3):
        alone, _ = build(members=[m])
        member_losses(alone.train(), *(t[m : m + 1] for t in batch), CONFIG)[1].sum().backward()
        for (name, mine), theirs in zip(alone.named_parameters(), together.parameters(), strict=True):
            torch.testing.assert_close(theirs.grad[m : m + 1], mine.grad, atol=1e-6, rtol=1e-5, msg=name)


def problem(noise=0.6, images=6, attention=True):
    """Small maps whose second run tells the label of a position, under noise."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, CLASSES, (images, 4, 4), generator=generator)
    tables = PixelTables(
        images=images,
        runs=RUNS,
        layers={"a": (CHANNELS, 4, 4)},
        attention={"t": (ATTENTION, 2, 2)} if attention else {},
        grid_size=(4, 4),
        dtype=torch.float32,
        device="cpu",
    )
    code = torch.randn(CLASSES, CHANNELS, generator=generator)
    for run in range(RUNS):
        maps = torch.randn(images, CHANNELS, 4, 4, generator=generator)
        if run == 1:
            maps = noise * maps + code[labels].permute(0, 3, 1, 2)
        tables.layers["a"].put(run, range(images), maps)
    if attention:
        tables.attention["t"].put(0, range(images), torch.randn(images, ATTENTION, 2, 2, generator=generator))
    standardise = Standardise(RUNS, CHANNELS, ATTENTION if attention else 0)
    standardise.fit(*tables.moments())
    tables.standardise(standardise)
    return tables, torch.arange(images * 16), labels.reshape(-1)


def quick(**changes):
    values = {"members": 3, "hidden": (8, 7), "assigner_hidden": 6, "batch_size": 16, "free_epochs": 1}
    return PixelHeadConfig(**{**values, "patience_steps": 8, "max_epochs": 30, **changes})


def test_a_member_becomes_the_same_whoever_trains_beside_it(monkeypatch):
    monkeypatch.setattr(training, "_GATHERED_BYTES", 3000)  # a few steps at a time, so that windows end unevenly
    tables, pixels, labels = problem()
    config = quick()
    together, generators = build(config)
    log = train_members(together, tables, pixels, labels, config, generators=generators)
    assert len(set(log.steps)) > 1, "the members stopped together; nothing would be shown"
    vectors = tables.gather(pixels)
    for m in range(3):
        alone, generators = build(config, members=[m])
        own = train_members(alone, tables, pixels, labels, config, generators=generators)
        assert own.steps == (log.steps[m],)
        assert own.losses[0] == pytest.approx(log.losses[m], abs=1e-4)
        # Scores, not parameters: a bias before a unit that is always active has no gradient (the BatchNorm
        # after it takes any shift away), so Adam walks it along rounding noise, to no effect.
        scores = [f(*(t.expand(f.members, *t.shape) for t in vectors))[0] for f in (together, alone)]
        torch.testing.assert_close(scores[0][m : m + 1], scores[1], atol=1e-3, rtol=1e-3)


def test_training_lowers_the_loss_and_leaves_the_head_in_evaluation_mode():
    tables, pixels, labels = problem()
    config = quick(max_epochs=60, max_steps=350, free_epochs=100, learning_rate=5e-3)
    members, generators = build(config)
    vectors = [t.expand(3, *t.shape) for t in tables.gather(pixels)]
    before, _ = member_losses(members.eval(), *vectors, labels.expand(3, -1), config)
    calls = []
    log = train_members(
        members, tables, pixels, labels, config, generators=generators, progress=lambda *a: calls.append(a)
    )
    after, _ = member_losses(members, *vectors, labels.expand(3, -1), config)
    assert not members.training
    assert not members.assigners.norm.training
    assert (after < 0.5 * before).all()
    assert log.steps == (350,) * 3
    assert calls == [*((n, 350) for n in range(50, 351, 50)), (350, 350)]


def test_a_loss_that_never_improves_stops_after_the_free_epochs_and_the_patience():
    # constant features and labels: every batch has the same loss, and a step too small to change it
    tables, pixels, _ = problem()
    for table in [*tables.layers.values(), *tables.attention.values()]:
        table.values.zero_()
    config = quick(learning_rate=1e-30, free_epochs=2, patience_steps=5)
    members, generators = build(config)
    log = train_members(members, tables, pixels, torch.zeros_like(pixels), config, generators=generators)
    # 2 epochs of 6 batches pass freely, the next one sets the minimum, five more do not improve it
    assert log.steps == (2 * 6 + 1 + 5,) * 3
    assert log.steps_an_epoch == 6


def test_max_steps_ends_within_an_epoch():
    tables, pixels, labels = problem()
    members, generators = build(quick())
    log = train_members(members, tables, pixels, labels, quick(max_steps=4), generators=generators)
    assert log.steps == (4, 4, 4)


def test_an_epoch_shows_every_pixel_at_most_once(monkeypatch):
    tables, pixels, labels = problem()
    seen = []
    gather = PixelTables.gather

    def spy(self, wanted, into=None):
        seen.append(wanted.clone())
        return gather(self, wanted, into)

    monkeypatch.setattr(PixelTables, "gather", spy)
    config = quick(members=1, max_epochs=1)
    members, generators = build(config, members=[0])
    train_members(members, tables, pixels, labels, config, generators=generators)
    assert sorted(torch.cat(seen).tolist()) == pixels.tolist()  # 96 pixels are 6 full batches


def test_fewer_pixels_than_a_batch_are_one_batch_and_a_single_one_is_refused():
    tables, pixels, labels = problem()
    members, generators = build(quick())
    log = train_members(members, tables, pixels[:5], labels[:5], quick(max_epochs=2), generators=generators)
    assert log.steps == (2, 2, 2)
    with pytest.raises(BadRequestError, match="at least 2"):
        train_members(members, tables, pixels[:1], labels[:1], quick(), generators=generators)


def test_one_run_has_no_assigner_and_no_attention_is_fine():
    members, _ = build(runs=1, attention=0)
    logits, weights = members(torch.randn(3, 6, 1, CHANNELS), torch.empty(3, 6, 0))
    assert logits.shape == (3, CLASSES, 6)
    assert weights is None
    assert not [name for name, _ in members.named_parameters() if "assigners" in name or "weight1" in name]


@pytest.mark.parametrize(
    "change",
    [
        {"members": 0},
        {"assigners": 0},
        {"batch_size": 1},
        {"max_steps": 0},
        {"learning_rate": 0.0},
        {"gamma1": -1.0},
        {"gamma2": float("nan")},
        {"hidden": (3,)},
        {"patience_steps": 0},
        {"max_epochs": 0},
    ],
)
def test_impossible_configurations_are_refused_with_the_value(change):
    with pytest.raises(BadRequestError, match=next(iter(change))):
        PixelHeadConfig(**change)


def test_many_classes_get_a_wider_network():
    config = PixelHeadConfig()
    assert config.hidden_for(29) == (128, 32)
    assert config.hidden_for(30) == (256, 128)
    assert PixelHeadConfig(hidden=(5, 4)).hidden_for(30) == (5, 4)


@pytest.mark.parametrize("size", [1, 2])
def test_groups_of_members_become_what_all_together_do(monkeypatch, size):
    tables, pixels, labels = problem()
    config = quick(max_steps=60)
    together, generators = build(config)
    whole = train_members(together, tables, pixels, labels, config, generators=generators)
    monkeypatch.setattr(training, "_groups", lambda members, device: [[0], [1], [2]] if size == 1 else [[0, 1], [2]])
    apart, generators = build(config)
    calls = []
    log = train_members(
        apart, tables, pixels, labels, config, generators=generators, progress=lambda *a: calls.append(a)
    )
    assert log.steps == whole.steps
    vectors = tables.gather(pixels)
    scores = [f(*(t.expand(3, *t.shape) for t in vectors))[0] for f in (together, apart)]
    torch.testing.assert_close(*scores, atol=1e-3, rtol=1e-3)
    done, most = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == most[-1]


def test_large_heads_train_in_groups_on_a_cpu_and_small_ones_at_once(monkeypatch):
    members, _ = build(CONFIG, members=range(3))
    assert training._groups(members, torch.device("cpu")) == [[0, 1, 2]]
    monkeypatch.setattr(training, "_GROUP_BYTES", 1)
    assert training._groups(members, torch.device("cpu")) == [[0], [1], [2]]
    assert training._groups(members, torch.device("cuda")) == [[0, 1, 2]]

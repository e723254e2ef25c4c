import logging
import weakref

import dask.array as da
import numpy as np
import pytest
import torch

from featstore.errors import BadRequestError, NotCommittedError
from featstore.heads import Features, semantic
from featstore.heads.labels import PackedLabels, PackedMap
from featstore.heads.semantic import predict_rows, segmentation_loss, train_semantic
from featstore.heads.stream import Stream
from featstore.heads.upernet import UPerNetHeadConfig
from featstore.metrics import SegmentationMeter
from tests.heads.planted import CLASSES, IMAGES, SIGNAL_RUN, masks, task

CONFIG = UPerNetHeadConfig(width=16, learning_rate=1e-2, max_steps=80)
SHORT = UPerNetHeadConfig(width=4, learning_rate=1e-2, max_steps=3)


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    return train_semantic(task(), CONFIG, seed=1)


def test_a_signal_in_one_run_is_found_on_plain_dask_arrays_and_that_run_is_weighed_most(trained):
    assert trained.metrics["miou"] > 0.8
    assert trained.metrics["macc"] > 0.85
    assert trained.metrics["steps"] == 80
    chosen = np.array(trained.metrics["assigner_weights"]["fine"])  # (assigners, runs)
    assert chosen.mean(0).argmax() == SIGNAL_RUN
    np.testing.assert_allclose(chosen.sum(1), 1, atol=1e-5)
    assert set(trained.metrics["assigner_weights"]) == {"coarse", "fine"}


def test_noise_scores_like_chance():
    result = train_semantic(task(signal_runs=()), CONFIG, seed=1)
    # four classes of equal size, guessed independently: IoU (1/16) / (7/16) = 1/7
    assert result.metrics["miou"] < 0.25


def test_the_metrics_are_those_of_the_predictions_whatever_the_rows_order(trained):
    meter, doubts, seen = SegmentationMeter(CLASSES), [], []
    for rows, said in predict_rows(task().features, trained.head, [*range(IMAGES - 1, 13, -1)]):
        meter.update(said.labels, masks()[rows])
        doubts.append(said.uncertainty)
        seen.extend(rows.tolist())
    assert seen == list(range(14, IMAGES))
    scores = meter.compute()
    for name in ("miou", "accuracy", "macc", "per_class"):
        assert trained.metrics[name] == scores.to_json()[name]
    assert trained.metrics["uncertainty"] == pytest.approx(np.concatenate(doubts).mean(), rel=1e-5)
    assert trained.metrics["test_images"] == 16
    assert trained.metrics["train_images"] == 12


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not():
    first, again, other = (train_semantic(task(), SHORT, seed=seed).head.tensors() for seed in (1, 1, 2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["decoder.classifier.weight"], other["decoder.classifier.weight"])


def test_one_run_and_weights_per_channel_train():
    alone = train_semantic(task(count=1, signal_runs=(0,), attention=False), SHORT)
    assert "assigner_weights" not in alone.metrics
    config = UPerNetHeadConfig(width=4, per_channel=True, assigners=3, max_steps=3)
    weights = train_semantic(task(), config).metrics["assigner_weights"]
    assert np.array(weights["coarse"]).shape == (3, 3)


@pytest.mark.parametrize("power", [0.0, 0.9])
def test_the_step_size_falls_polynomially_from_the_papers_to_0(monkeypatch, power):
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self, *args):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    train_semantic(task(test_rows=()), UPerNetHeadConfig(width=4, max_steps=5, decay_power=power))
    assert rates == pytest.approx([1.6e-4 * (1 - step / 5) ** power for step in range(5)])


def test_the_loss_is_cross_entropy_and_the_lovasz_extension_of_each_class_written_out():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, generator=generator)
    labels = torch.randint(0, 3, (2, 3, 5), generator=generator)  # class 3 is nowhere
    labels[0, 0, :2] = 255
    named = labels != 255
    p = logits.double().softmax(1).permute(0, 2, 3, 1)[named]  # (P, classes)
    y = labels[named]
    entropy = -p[torch.arange(len(y)), y].log().mean()
    losses = []
    for label in range(3):
        wrong = (p[:, label] - (y == label).double()).abs().tolist()
        order = sorted(range(len(y)), key=lambda i: -wrong[i])
        # the extension: mistakes are made worst first, each costs what it takes off the class's overlap
        loss, mistakes, before = 0.0, set(), 0.0
        for i in order:
            mistakes.add(i)
            of_class = {j for j in range(len(y)) if y[j] == label}
            overlap = 1 - len(of_class - mistakes) / len(of_class | mistakes)
            loss += wrong[i] * (overlap - before)
            before = overlap
        losses.append(loss)
    both = entropy + 0.7 * sum(losses) / 3
    assert segmentation_loss(logits, labels, lovasz=0.7, ignore_label=255).item() == pytest.approx(both.item())
    assert segmentation_loss(logits, labels, lovasz=0.0, ignore_label=255).item() == pytest.approx(entropy.item())


def test_training_reads_a_window_ahead_and_holds_few_batches(monkeypatch):
    """20 blocks of 2 images, one block a window: reading never runs away from training, and nothing is kept."""
    blocks, held = 20, {"most": 0, "now": 0}
    reads, given = [], []
    labels = np.kron(np.random.default_rng(0).integers(0, 4, (2 * blocks, 2, 2)), np.ones((1, 2, 2))).astype(np.uint8)

    def block(block_info=None):
        start, stop = block_info[None]["array-location"][0]
        reads.append(len(given))  # batches that had left when this block was read
        return np.random.default_rng(start).standard_normal((stop - start, 3, 4, 4)).astype(np.float16)

    class Watched(Stream):
        def epoch(self, number):
            for maps in super().epoch(number):
                held["now"] += 1
                held["most"] = max(held["most"], held["now"])
                weakref.finalize(maps.layers["a"], lambda: held.update(now=held["now"] - 1))
                given.append(maps.rows)
                yield maps
                del maps

    monkeypatch.setattr(semantic, "Stream", Watched)
    array = da.map_blocks(
        block, dtype=np.float16, chunks=((2,) * blocks, (3,), (4,), (4,)), meta=np.empty((0,) * 4, np.float16)
    )
    problem = task(
        maps=[{"a": array}], runs=(), attention=False, masks=labels, train_rows=range(2 * blocks), test_rows=()
    )
    config = UPerNetHeadConfig(width=4, batch_size=2, max_epochs=2, statistics_images=8)
    result = train_semantic(problem, config, window_bytes=1)
    assert result.metrics["steps"] == 2 * blocks
    # 4 batches of statistics, whose stream had read one block ahead, and two epochs
    assert len(given) == 4 + 2 * blocks
    assert len(reads) <= 5 + 2 * blocks
    passes = [reads[:5], *(reads[5 + n * blocks : 5 + (n + 1) * blocks] for n in range(2))]
    for start, one in zip((0, 4, 4 + blocks), passes, strict=True):
        for number, left in enumerate(one):
            assert number - (left - start) <= 2
    assert held["most"] <= 3


def test_labels_may_be_packed_and_small_areas_count_as_they_are():
    whole = masks()
    whole[:, 0, 0] = 3  # one pixel of a class: the small-area rule would ignore it
    packed = PackedLabels([PackedMap(mask) for mask in whole], whole.shape[1:])
    first, second = (train_semantic(task(masks=one), SHORT) for one in (whole, packed))
    assert first.metrics == second.metrics
    assert sum(row["pixels"] for row in first.metrics["per_class"]) == 16 * 16 * 16
    assert all(torch.equal(v, second.head.tensors()[n]) for n, v in first.head.tensors().items())


def test_images_without_labels_do_not_train_and_absent_classes_are_told(caplog):
    some = masks()
    some[some == 3] = 255
    some[:3] = 255
    with caplog.at_level(logging.WARNING):
        result = train_semantic(task(masks=some), SHORT)
    assert result.metrics["absent_from_training"] == ["eye"]
    assert "classes without a training pixel, which the head cannot learn: eye" in caplog.text
    assert result.head.facts["absent"] == ["eye"]
    some[:11] = 255
    with pytest.raises(BadRequestError, match="1 of the 12 training images have labelled pixels"):
        train_semantic(task(masks=some), SHORT)


def test_the_last_batch_of_an_epoch_is_left_out_where_it_is_one_image():
    seen = []
    config = UPerNetHeadConfig(width=4, batch_size=4, max_epochs=2)
    result = train_semantic(task(train_rows=range(9)), config, progress=lambda done, most: seen.append((done, most)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]  # 4 + 4 + (1) images, twice
    assert result.metrics["steps"] == 4
    seen.clear()
    train_semantic(task(train_rows=range(3)), config, progress=lambda done, most: seen.append((done, most)))
    assert seen == [(1, 2), (2, 2)]


def test_without_test_rows_there_is_a_head_and_no_score():
    result = train_semantic(task(test_rows=()), SHORT)
    assert result.metrics["miou"] is result.metrics["accuracy"] is result.metrics["macc"] is None
    assert result.metrics["test_images"] == 0


def test_a_loss_that_does_not_stay_finite_is_refused():
    config = UPerNetHeadConfig(width=4, learning_rate=1e30, max_steps=6)
    with pytest.raises(BadRequestError, match=r"the loss is (nan|inf) after 6 steps"):
        train_semantic(task(), config)


def test_errors_of_a_stores_tasks_come_through():
    def refuse(block_info=None):
        raise NotCommittedError("image 3 was never extracted", hint="extract it")

    array = da.map_blocks(
        refuse, dtype=np.float16, chunks=((IMAGES,), (3,), (4,), (4,)), meta=np.empty((0,) * 4, np.float16)
    )
    problem = task(maps=[{"a": array}], runs=(), attention=False)
    assert isinstance(problem.features, Features)
    with pytest.raises(NotCommittedError, match="never extracted"):
        train_semantic(problem, SHORT)

import dask.array as da
import numpy as np
import pytest
import torch
from torch.nn import functional

from featstore.errors import BadRequestError
from featstore.heads import (
    Beside,
    ClassificationConfig,
    ClassificationHead,
    ClassificationTask,
    Features,
    RunRef,
    load_head,
    save_head,
    score_classification,
    train_classification,
)
from featstore.heads.classification import head_generator
from featstore.heads.classification_batches import MapBatches
from featstore.heads.stream import Maps, Stream

IMAGES, CLASSES, SIGNAL = 60, ("cat", "dog", "horse"), 1
LAYERS = {"coarse.out": (5, 3, 4), "fine.out": (3, 6, 8)}


def labels(seed=0):
    return np.random.default_rng(seed).integers(0, len(CLASSES), IMAGES)


def maps(truth, *, signal, seed, dtype=np.float16):
    """Noise; where there is a signal, every class adds its own pattern to the means of the channels."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in LAYERS.items():
        code = rng.standard_normal((len(CLASSES), shape[0]))
        values = rng.standard_normal((IMAGES, *shape)) + signal * code[truth][:, :, None, None]
        out[name] = (values * (seed + 1) + 3 * seed).astype(dtype)  # another offset and scale in every run
    return out


def lazy(layers, block=7):
    return {name: da.from_array(v, chunks=(block, *v.shape[1:])) for name, v in layers.items()}


def task(*, runs=2, beside=True, signal=SIGNAL, **changes):
    truth = labels()
    refs = [RunRef(name=f"pass {k}", fingerprint=str(k) * 64) for k in range(runs)]
    bucket = [lazy(maps(truth, signal=2.0 * (k == signal), seed=k)) for k in range(runs)]
    attention = np.random.default_rng(99).standard_normal((IMAGES, 2, 3, 3)).astype(np.float16)
    values = {
        "features": Features(
            maps=bucket,
            runs=refs,
            beside=[Beside(run=refs[0], layers=lazy({"attn": attention}))] if beside else [],
        ),
        "labels": truth,
        "train_rows": range(40),
        "test_rows": range(40, IMAGES),
        "classes": CLASSES,
    }
    return ClassificationTask(**(values | changes))


def config(**changes):
    return ClassificationConfig(**({"width": 8, "hidden": 16, "least_steps": 120, "epochs": 1} | changes))


@pytest.mark.parametrize("form", ["conv", "linear"])
@pytest.mark.parametrize(("runs", "signal"), [(1, 0), (2, 1)])
def test_a_planted_problem_is_learnt(form, runs, signal):
    done = []
    result = train_classification(
        task(runs=runs, signal=signal),
        config(form=form, learning_rate=5e-3),
        progress=lambda *steps: done.append(steps),
    )
    assert result.metrics["accuracy"] > 0.9
    assert result.metrics["auroc"] > 0.95
    assert result.metrics["loss"] < 0.3
    assert result.metrics["steps"] == 120
    assert done[0] == (10, 120)
    assert done[-1] == (120, 120)
    assert result.predictions.tolist() == result.probabilities.argmax(1).tolist()
    assert (result.predictions == labels()[40:]).mean() == pytest.approx(result.metrics["accuracy"])


def test_nothing_is_learnt_where_nothing_is_to_be_learnt():
    result = train_classification(task(signal=None), config(form="linear"))
    assert result.metrics["accuracy"] < 0.7


@pytest.mark.parametrize("form", ["conv", "linear"])
def test_the_assigners_choose_the_run_with_the_signal(form):
    result = train_classification(task(), config(form=form, learning_rate=5e-3))
    weights = result.metrics["assigner_weights"]
    assert set(weights) == set(LAYERS)
    for rows in weights.values():
        assert np.shape(rows) == (2, 2)
        np.testing.assert_allclose(np.sum(rows, 1), 1, atol=1e-5)
    assert np.mean([np.mean(rows, 0)[SIGNAL] for rows in weights.values()]) > 0.6
    assert "assigner_weights" not in train_classification(task(runs=1), config(max_steps=2)).metrics


def test_weights_per_channel_are_read_out_as_means():
    result = train_classification(task(), config(per_channel=True, assigners=3, max_steps=3))
    assert np.shape(result.metrics["assigner_weights"]["coarse.out"]) == (3, 2)


def test_the_linear_form_is_what_a_few_lines_of_numpy_say():
    one = task(runs=1, signal=0)
    result = train_classification(one, config(form="linear", max_steps=30))
    tensors = {name: value.double().numpy() for name, value in result.head.tensors().items()}
    arrays = [*one.features.maps[0].values(), *one.features.beside[0].layers.values()]
    pooled = []
    for array in arrays:
        values = array.compute().astype(np.float64)
        train = values[:40]
        scaled = (values - train.mean((0, 2, 3), keepdims=True)) / train.std((0, 2, 3), keepdims=True)
        pooled.append(scaled.mean((2, 3)))
    vectors = np.concatenate(pooled, 1)
    vectors = (vectors - vectors[:40].mean(0)) / vectors[:40].std(0)
    logits = vectors[40:] @ tensors["net.linear.weight"].T + tensors["net.linear.bias"]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(result.probabilities, expected, atol=1e-4)


def test_the_conv_form_is_what_functional_calls_say():
    one = task(runs=1, signal=0)
    head = ClassificationHead(one.features.spec(), CLASSES, config(), head_generator(3))
    t = {name.removeprefix("net."): value for name, value in head.tensors().items()}
    rng = np.random.default_rng(0)
    given = {
        name: torch.from_numpy(rng.standard_normal((2, *shape)).astype(np.float32)) for name, shape in LAYERS.items()
    }
    attention = torch.from_numpy(rng.standard_normal((2, 2, 3, 3)).astype(np.float32))
    pooled = []
    for k, x in enumerate([*given.values(), attention]):
        x = functional.conv2d(x, t[f"branches.{k}.0.weight"], t[f"branches.{k}.0.bias"])
        x = functional.group_norm(x, 1, t[f"branches.{k}.1.weight"], t[f"branches.{k}.1.bias"]).relu()
        x = functional.conv2d(x, t[f"branches.{k}.3.weight"], t[f"branches.{k}.3.bias"], padding=1)
        x = functional.group_norm(x, 1, t[f"branches.{k}.4.weight"], t[f"branches.{k}.4.bias"]).relu()
        pooled += [x.flatten(2).mean(2), x.flatten(2).max(2).values]
    x = functional.linear(torch.cat(pooled, 1), t["mlp.0.weight"], t["mlp.0.bias"]).relu()
    expected = functional.linear(x, t["mlp.2.weight"], t["mlp.2.bias"]).softmax(1)
    said = head.predict([given], {"pass 0/attn": attention})  # not fitted: maps pass through as they are
    np.testing.assert_allclose(said.probabilities, expected.numpy(), atol=1e-6)
    assert said.labels.tolist() == expected.argmax(1).tolist()


@pytest.mark.parametrize("form", ["conv", "linear"])
@pytest.mark.parametrize(("runs", "signal"), [(1, 0), (2, 1)])
def test_maps_that_do_not_fit_into_memory_are_streamed(form, runs, signal):
    result = train_classification(
        task(runs=runs, signal=signal),
        config(form=form, learning_rate=1e-2, batch_size=16, least_steps=60),
        window_bytes=12_000,
    )
    assert result.metrics["accuracy"] > 0.9


def test_batches_from_memory_are_those_of_a_stream():
    features = task().features
    rows = [*range(3, 40), 50]
    kept = MapBatches(features, rows, batch=8, seed=4)
    stream = Stream(features=features, rows=rows, batch=8, seed=4)
    assert kept.held
    assert kept.count == 38
    for epoch in (0, 3):
        for ours, theirs, order in zip(kept.epoch(epoch), stream.epoch(epoch), kept.orders(epoch), strict=True):
            assert ours.rows.tolist() == theirs.rows.tolist() == order.tolist()
            assert all(torch.equal(value, theirs.layers[name]) for name, value in ours.layers.items())
            assert all(torch.equal(value, theirs.beside[name]) for name, value in ours.beside.items())


def test_what_is_kept_is_read_once_and_what_is_not_in_every_epoch():
    truth, reads = labels(), []
    values = maps(truth, signal=2.0, seed=0)["coarse.out"]

    def block(block_info=None):
        start, stop = block_info[None]["array-location"][0]
        reads.append(start)
        return values[start:stop]

    chunks = ((10,) * 6, *((n,) for n in LAYERS["coarse.out"]))
    array = da.map_blocks(block, dtype=np.float16, chunks=chunks, meta=np.empty((0,) * 4, np.float16))
    one = task(features=Features(maps=[{"coarse.out": array}]), test_rows=[])
    counts = {}
    for form, window in (("conv", 10**6), ("conv", 1300), ("linear", 1300)):
        reads.clear()
        train_classification(one, config(form=form, max_steps=6, batch_size=20), window_bytes=window)
        assert set(reads) == {0, 10, 20, 30}
        counts[form, window] = len(reads)
    # conv: for the scale, and three epochs of two steps; linear: for the scale and the means
    assert counts == {("conv", 10**6): 4, ("conv", 1300): 16, ("linear", 1300): 8}


@pytest.mark.parametrize("form", ["conv", "linear"])
def test_the_same_seed_gives_the_same_head_and_another_another(form):
    def weights(seed):
        torch.rand(7)  # whatever else draws numbers
        return train_classification(task(), config(form=form, max_steps=15), seed=seed).head.tensors()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_training_leaves_torch_s_own_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_classification(task(), config(max_steps=2))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("form", ["conv", "linear"])
def test_a_saved_head_predicts_bit_for_bit_the_same(form, tmp_path):
    one = task()
    result = train_classification(one, config(form=form, assigners=3, max_steps=10))
    head = load_head(save_head(tmp_path / "head", result.head, metrics=result.metrics))
    assert isinstance(head, ClassificationHead)
    assert (head.classes, head.config, head.features) == (CLASSES, result.head.config, one.features.spec())
    scored = score_classification(one, head)
    np.testing.assert_array_equal(scored.probabilities, result.probabilities)
    same = ("accuracy", "auroc", "aurc", "per_class", "assigner_weights", "test_images")
    assert {n: scored.metrics[n] for n in same} == {n: result.metrics[n] for n in same}


def test_predict_takes_maps_by_run_and_says_what_is_missing():
    one = task()
    result = train_classification(one, config(max_steps=10))
    bucket = [{name: array[40:].compute() for name, array in run.items()} for run in one.features.maps]
    beside = {"pass 0/attn": one.features.beside[0].layers["attn"][40:].compute()}
    said = result.head.predict(bucket, beside)
    np.testing.assert_allclose(said.probabilities, result.probabilities, atol=1e-6)
    assert said.assigner_weights["fine.out"].shape == (2, 2)
    with pytest.raises(BadRequestError, match="2 runs, not of 1"):
        result.head.predict(bucket[:1], beside)
    with pytest.raises(BadRequestError, match="needs layer 'pass 0/attn'; given: none"):
        result.head.predict(bucket)
    with pytest.raises(BadRequestError, match=r"'coarse.out' is \(19, 5, 3, 4\), the head needs \(20, 5, 3, 4\)"):
        result.head.predict([bucket[0], {**bucket[1], "coarse.out": bucket[1]["coarse.out"][1:]}], beside)


def test_label_smoothing_keeps_the_scores_closer_together():
    plain, smooth = (
        train_classification(task(runs=1, signal=0), config(form="linear", label_smoothing=part, least_steps=400))
        for part in (0.0, 0.3)
    )
    assert plain.probabilities.max(1).mean() > smooth.probabilities.max(1).mean() + 0.05


def test_few_images_are_gone_through_again_and_many_the_given_number_of_times():
    assert ClassificationConfig(batch_size=10, epochs=20, least_steps=300).steps(25) == 300
    assert ClassificationConfig(batch_size=10, epochs=20, least_steps=300).steps(1001) == 20 * 101
    assert ClassificationConfig(max_steps=7).steps(1001) == 7


def test_classes_that_are_absent_are_named_and_have_no_score(caplog):
    truth = labels()
    rows = [row for row in range(40) if truth[row] != 1]
    tested = [row for row in range(40, IMAGES) if truth[row] != 0]
    result = train_classification(task(train_rows=rows, test_rows=tested), config(max_steps=5))
    assert result.metrics["absent_from_training"] == ["dog"]
    assert "cannot learn: dog" in caplog.text
    first = result.metrics["per_class"][0]
    assert first == {"class": "cat", "images": 0, "accuracy": None, "auroc": None, "average_precision": None}
    assert result.metrics["per_class"][1]["auroc"] is not None


def test_nothing_to_score_gives_no_numbers():
    metrics = train_classification(task(test_rows=[]), config(max_steps=2)).metrics
    assert metrics["test_images"] == 0
    assert metrics["accuracy"] is metrics["auroc"] is metrics["aurc"] is None


def test_rows_need_not_be_sorted_or_labelled_elsewhere():
    truth = labels()
    truth[50:] = -1
    result = train_classification(
        task(labels=truth.astype(np.int32), train_rows=[30, 2, 17, 9, 4], test_rows=[48, 41]), config(max_steps=3)
    )
    assert result.test_rows.tolist() == [41, 48]
    assert result.metrics["train_images"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("cat",)}, "one class only, 'cat'"),
        ({"classes": ()}, "no classes"),
        ({"classes": CLASSES[:2]}, r"row \d+ has label 2; labels are 0\.\.1"),
        ({"labels": np.full(IMAGES, -1)}, "row 0 has no label"),
        ({"labels": np.zeros(IMAGES, np.int64)}, "all 40 training images are of one class, 'cat'"),
        ({"labels": labels()[:-1]}, "60 images, there are 59 labels"),
        ({"labels": labels().astype(np.float32)}, "labels are .* integers"),
        ({"train_rows": []}, "no training rows"),
        ({"train_rows": [3, 60]}, "training row 60 is outside 0..59"),
        ({"test_rows": [-1]}, "test row -1 is outside"),
        ({"test_rows": [39, 40]}, "1 rows are both trained and tested on, the first is 39"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(BadRequestError, match=message):
        train_classification(task(**changes), config(max_steps=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"form": "convolution"},
        {"assigners": 0},
        {"width": 0},
        {"batch_size": 0},
        {"max_steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -1.0},
        {"gamma1": float("inf")},
        {"label_smoothing": 1.0},
    ],
)
def test_configurations_that_no_training_can_have_are_refused(changes):
    with pytest.raises(BadRequestError, match=next(iter(changes)).split("_")[0]):
        ClassificationConfig(**changes)


def test_a_training_that_explodes_says_so():
    with pytest.raises(BadRequestError, match="loss is") as caught:
        train_classification(task(), config(learning_rate=1e30, max_steps=12))
    assert "learning rate" in caught.value.hint


def test_a_head_needs_two_classes():
    with pytest.raises(BadRequestError, match="2 classes or more, not 1"):
        ClassificationHead(task().features.spec(), ["cat"], config(), head_generator(0))


def test_maps_of_half_precision_are_widened():
    one = task(runs=1, beside=False)
    head = ClassificationHead(one.features.spec(), CLASSES, config(), head_generator(0))
    layers = {name: torch.zeros(1, 1, *shape, dtype=torch.float16) for name, shape in LAYERS.items()}
    assert head.predict_maps(Maps(rows=np.arange(1), layers=layers, beside={})).probabilities.dtype == np.float32

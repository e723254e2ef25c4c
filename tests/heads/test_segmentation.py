import dask
import dask.array as da
import numpy as np
import pytest
import torch

from featstore.errors import BadRequestError, NotCommittedError
from featstore.heads import PixelHeadConfig, predict_rows, train_segmentation
from featstore.heads import tables as tables_module
from featstore.heads.segmentation import score
from featstore.metrics import SegmentationMeter
from tests.heads.planted import CLASSES, IMAGES, LAYERS, SIGNAL_RUN, lazy, maps, masks, task

CONFIG = PixelHeadConfig(members=3, max_steps=300, hidden=(32, 16))


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    return train_segmentation(task(), CONFIG, seed=1)


def test_a_signal_in_one_run_is_found_and_that_run_is_weighed_most(trained):
    assert trained.metrics["miou"] > 0.8
    assert trained.metrics["accuracy"] > 0.85
    chosen = trained.weights.mean((0, 1))
    assert chosen.argmax() == SIGNAL_RUN
    assert chosen[SIGNAL_RUN] > 0.5
    assert (trained.weights_by_class.argmax(1) == SIGNAL_RUN).all()


def test_noise_scores_like_chance():
    result = train_segmentation(task(signal_runs=()), CONFIG, seed=1)
    # four classes of equal size, guessed independently: IoU (1/16) / (7/16) = 1/7
    assert result.metrics["miou"] < 0.2
    assert abs(result.weights.mean((0, 1)) - 1 / 3).max() < 0.15


def test_weights_sum_to_one(trained):
    assert trained.weights.shape == (3, 2, 3)
    np.testing.assert_allclose(trained.weights.sum(2), 1, atol=1e-5)
    np.testing.assert_allclose(trained.weights_by_class.sum(1), 1, atol=1e-5)


def test_weights_by_class_are_means_over_the_pixels_of_the_class(trained):
    problem = task()
    whole = [lazy(dict_of(layers), block=IMAGES) for layers in problem.features.maps]
    ((rows, said),) = predict_rows(task(maps=whole).features, trained.head, range(14, IMAGES))
    for label in range(4):
        chosen = said.weights.transpose(0, 2, 3, 1)[problem.masks[rows] == label]
        np.testing.assert_allclose(trained.weights_by_class[label], chosen.mean(0), atol=1e-4)
    np.testing.assert_allclose(trained.weights, said.assigner_weights, atol=1e-5)


def dict_of(layers):
    return {name: array.compute() for name, array in layers.items()}


def test_the_metrics_are_those_of_the_predictions(trained):
    problem = task()
    meter = SegmentationMeter(CLASSES)
    assert trained.test_rows.tolist() == list(problem.test_rows)
    meter.update(trained.predictions, problem.masks[trained.test_rows])
    assert trained.metrics["miou"] == pytest.approx(meter.compute().miou)
    assert trained.metrics["per_class"] == meter.compute().to_json()["per_class"]
    assert len(trained.metrics["member_miou"]) == 3
    assert trained.metrics["uncertainty"] == pytest.approx(float(trained.uncertainty.mean()))
    assert trained.uncertainty.min() >= 0
    assert trained.uncertainty.max() <= np.log(3)
    assert trained.metrics["steps"] == [300] * 3
    assert (trained.metrics["train_images"], trained.metrics["test_images"]) == (12, 16)


def test_members_disagree_more_where_they_are_wrong(trained):
    wrong = trained.predictions != task().masks[trained.test_rows]
    assert trained.uncertainty[wrong].mean() > 2 * trained.uncertainty[~wrong].mean()


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not(trained):
    again = train_segmentation(task(), CONFIG, seed=1)
    other = train_segmentation(task(), CONFIG, seed=2)
    np.testing.assert_array_equal(again.uncertainty, trained.uncertainty)
    assert again.metrics == trained.metrics
    for name, value in again.head.members.state_dict().items():
        assert torch.equal(value, trained.head.members.state_dict()[name]), name
    assert (other.uncertainty != trained.uncertainty).any()


def test_chunks_and_order_of_rows_make_no_difference_to_what_is_read(trained):
    problem = task()
    rechunked = [{n: a.rechunk((IMAGES, *a.shape[1:])) for n, a in layers.items()} for layers in problem.features.maps]
    whole = train_segmentation(task(maps=rechunked, test_rows=[*range(IMAGES - 1, 13, -1)]), CONFIG, seed=1)
    assert whole.test_rows.tolist() == trained.test_rows.tolist()
    np.testing.assert_array_equal(whole.predictions, trained.predictions)


def test_maps_too_large_for_float32_are_held_as_they_are_stored(trained, monkeypatch):
    monkeypatch.setattr(tables_module, "WIDE_LIMIT_BYTES", 0)
    narrow = train_segmentation(task(), CONFIG, seed=1)
    assert narrow.metrics["miou"] == pytest.approx(trained.metrics["miou"], abs=0.02)
    np.testing.assert_allclose(narrow.weights, trained.weights, atol=0.05)


def test_one_run_trains_without_assigners():
    result = train_segmentation(task(count=1, signal_runs=(0,), attention=False), CONFIG)
    assert result.metrics["miou"] > 0.8
    assert result.weights is None
    assert result.weights_by_class is None
    assert result.head.features.beside == ()


def test_attention_layers_reach_the_head():
    labels = masks()
    attention = {"attn": lazy(maps(labels, signal=True, seed=5))["coarse"]}
    plain = train_segmentation(task(signal_runs=(), attention=False), CONFIG)
    helped = train_segmentation(task(signal_runs=(), attention=attention), CONFIG)
    assert helped.metrics["miou"] > plain.metrics["miou"] + 0.3


def test_only_blocks_with_wanted_rows_are_read_and_each_once():
    reads = []

    def counted(layers, run):
        out = {}
        for name, values in layers.items():

            def block(values=values, name=name, block_info=None):
                start, stop = block_info[None]["array-location"][0]
                reads.append((run, name, start))
                return values[start:stop]

            chunks = ((7, 7, 7, 7, 2), *((n,) for n in values.shape[1:]))
            out[name] = da.map_blocks(block, dtype=values.dtype, chunks=chunks, meta=values[:0])
        return out

    labels = masks()
    bucket = [counted(maps(labels, signal=k == SIGNAL_RUN, seed=k), k) for k in range(3)]
    problem = task(maps=bucket, attention=False, train_rows=[0, 3, 9], test_rows=[22, 23, 27])
    train_segmentation(problem, PixelHeadConfig(members=1, max_steps=2))
    assert sorted(reads) == sorted((k, n, s) for k in range(3) for n in LAYERS for s in (0, 7, 21))


def test_errors_of_a_stores_tasks_come_through():
    def refuse(block_info=None):
        raise NotCommittedError("image 3 was never extracted", hint="extract it")

    broken = da.map_blocks(refuse, dtype=np.float16, chunks=((IMAGES,), (5,), (8,), (8,)), meta=np.empty((0,) * 4))
    problem = task()
    bucket = [{**layers, "fine": broken} for layers in problem.features.maps]
    with pytest.raises(NotCommittedError, match="never extracted"):
        train_segmentation(task(maps=bucket), CONFIG)


def test_small_areas_neither_train_nor_count():
    large = np.zeros((IMAGES, 64, 64), np.uint8)
    large[:, 0, 0], large[:, 5, 5:7] = 1, 2
    kept = task(masks=large).labels([4])[0]
    assert kept[0, 0] == 255  # one pixel, where 64 x 64 asks for two
    assert (kept[5, 5:7] == 2).all()
    assert (kept == 0).sum() == 64 * 64 - 3


def test_the_small_area_rule_holds_for_the_score_too():
    large = np.kron(masks(), np.ones((1, 4, 4), np.uint8))  # 64 x 64, where two pixels are the least
    large[14][large[14] == 3] = 2
    large[14, 10, 10] = 3
    result = train_segmentation(task(masks=large), PixelHeadConfig(members=1, max_steps=2))
    counted = [row["pixels"] for row in result.metrics["per_class"]]
    assert counted[:3] == [(large[14:] == label).sum() for label in range(3)]
    assert counted[3] == (large[15:] == 3).sum() > 0


def test_a_class_without_training_pixels_is_told(caplog):
    labels = masks()
    labels[:12][labels[:12] == 3] = 255
    result = train_segmentation(task(masks=labels), PixelHeadConfig(members=1, max_steps=20))
    assert result.metrics["absent_from_training"] == ["eye"]
    assert "eye" in caplog.text
    by_class = {row["class"]: row for row in result.metrics["per_class"]}
    assert by_class["eye"]["iou"] is None
    assert by_class["eye"]["pixels"] > 0
    others = [row["iou"] for name, row in by_class.items() if name != "eye" and row["iou"] is not None]
    assert result.metrics["miou"] == pytest.approx(np.mean(others))
    again = score(task(masks=labels), result.head)
    assert again.metrics["per_class"] == result.metrics["per_class"]


def test_without_test_rows_there_is_a_head_and_no_score():
    result = train_segmentation(task(test_rows=[]), PixelHeadConfig(members=2, max_steps=3))
    assert result.metrics["miou"] is None
    assert result.predictions.shape == (0, 16, 16)
    assert result.weights is None


def test_rows_predict_the_same_block_by_block_as_at_once(trained):
    problem = task()
    parts = list(predict_rows(problem.features, trained.head, [29, 2, 15, 16]))
    assert np.concatenate([rows for rows, _ in parts]).tolist() == [2, 15, 16, 29]
    assert len(parts) == 3
    rows = [2, 15, 16, 29]
    arrays = dask.compute([{n: a[rows] for n, a in layers.items()} for layers in problem.features.maps])[0]
    attention = {"pass 0/attn": problem.features.beside[0].layers["attn"][rows].compute()}
    whole = trained.head.predict(arrays, attention)
    np.testing.assert_array_equal(np.concatenate([p.labels for _, p in parts]), whole.labels)


def test_progress_ends_at_the_last_step():
    calls = []
    train_segmentation(
        task(), PixelHeadConfig(members=1, max_steps=120), progress=lambda done, most: calls.append((done, most))
    )
    assert calls == [(50, 120), (100, 120), (120, 120)]


def labelled(value, row):
    out = masks()
    out[row, 3, 3] = value
    return out


def nan_in(row):
    bucket = [maps(masks(), signal=False, seed=k) for k in range(3)]
    bucket[2]["fine"][row, 0, 0, 0] = np.nan
    return [lazy(layers) for layers in bucket]


def reshaped():
    bucket = list(task().features.maps)
    bucket[1] = {**bucket[1], "fine": bucket[1]["fine"][:, :3]}
    return bucket


def one_without_coarse():
    bucket = list(task().features.maps)
    return [*bucket[:2], {"fine": bucket[2]["fine"]}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda: {"masks": labelled(4, 2)}, r"label 4 in row 2 .* 0\.\.3"),
        (lambda: {"masks": np.full_like(masks(), 255)}, "0 labelled pixels"),
        (lambda: {"masks": masks()[0]}, r"\(N, h, w\)"),
        (lambda: {"masks": masks()[:5], "train_rows": [0], "test_rows": [1]}, "30 images, the masks have 5"),
        (lambda: {"train_rows": [0, 14]}, "both trained and tested"),
        (lambda: {"train_rows": [30]}, r"training row 30 is outside 0\.\.29"),
        (lambda: {"test_rows": [-1]}, "test row -1"),
        (lambda: {"train_rows": []}, "no training rows"),
        (lambda: {"maps": []}, "at least one run"),
        (
            lambda: {"maps": [*task().features.maps[:2], {"fine": task().features.maps[2]["fine"]}]},
            "run pass 2 differs in coarse",
        ),
        (lambda: {"maps": reshaped()}, "layer fine is .* in run pass 0 and .* in run pass 1"),
        (lambda: {"maps": nan_in(3)}, "layer fine of run pass 2 holds NaN or infinity in rows 3"),
        (lambda: {"maps": nan_in(20)}, "holds NaN or infinity in rows 20"),
        (lambda: {"runs": task().features.runs[:2]}, "2 names for 3 runs"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(BadRequestError, match=message):
        train_segmentation(task(**changes()), PixelHeadConfig(members=1, max_steps=2))


def test_a_label_outside_the_classes_in_an_unused_row_is_no_matter():
    train_segmentation(task(masks=labelled(200, 13)), PixelHeadConfig(members=1, max_steps=2))

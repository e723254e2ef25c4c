import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from featstore.errors import BadRequestError, IncompatibleError
from featstore.heads import Features, load_head, save_head
from featstore.heads.correspondence import CorrespondenceHead, match
from featstore.heads.correspondence_net import CorrespondenceConfig
from featstore.heads.correspondence_scoring import score_correspondence
from featstore.heads.correspondence_task import ImagePoints, mirrored_name, shared
from featstore.heads.correspondence_training import mirrored_target, pair_loss, train_correspondence
from featstore.heads.stream import read_maps
from featstore.metrics_correspondence import CorrespondenceMeter
from tests.heads import planted_points as planted

NN = CorrespondenceConfig(conv=False)
CONV = CorrespondenceConfig(conv=True, conv_channels=16, max_steps=60, learning_rate=3e-3)


def test_nearest_neighbours_of_one_run_need_no_training():
    result = train_correspondence(planted.task(), NN)
    assert result.losses == ()
    assert result.metrics["steps"] == 0
    assert result.metrics["pck_bbox"] > 0.9  # a point found at random: 0.01
    assert result.metrics["assigner_weights"] == {}
    assert result.metrics["train_images"] == 12
    assert result.metrics["test_images"] == 8
    assert sorted(result.metrics["per_category"]) == ["cow", "horse"]
    json.dumps(result.metrics, allow_nan=False)


def test_scores_are_those_of_a_search_of_everything_brought_to_the_grid():
    """The whole way written apart: standardise, upsample all to one size, concatenate, compare with every position."""
    task = planted.task(noise=0.7, beside=True)
    result = train_correspondence(task, NN)
    rows = np.unique(task.train_pairs)
    names = ["coarse", "fine.map"]
    stored = {name: task.features.maps[0][name].compute().astype(np.float64) for name in names}
    stored["attn"] = task.features.beside[0].layers["attn"].compute().astype(np.float64)
    scaled = []
    for values in stored.values():
        mean, deviation = (f(values[rows], axis=(0, 2, 3)) for f in (np.mean, np.std))
        scaled.append(torch.from_numpy((values - mean[:, None, None]) / deviation[:, None, None]))

    def whole(side):
        sizes = [functional.interpolate(one, (side, side), mode="bilinear", align_corners=False) for one in scaled]
        return torch.cat(sizes, 1)

    points, grid = whole(planted.SIDE), functional.normalize(whole(2 * planted.SIDE), dim=1)
    meter = CorrespondenceMeter()
    for source, target in task.test_pairs.tolist():
        here, there = shared(task.points[source], task.points[target])
        found = []
        for x, y in (task.points[source].xy[here] * planted.SIDE).astype(int).tolist():
            vector = points[source][:, y, x]
            best = int((vector[:, None, None] * grid[target]).sum(0).argmax())
            found.append([(best % 16 + 0.5) / 16 * 80, (best // 16 + 0.5) / 16 * 40])
        truth = task.points[target].xy[there] * np.array([80, 40])
        meter.update(np.array(found), truth, size_px=(40, 80), box_px=(10, 5, 60, 35))
    assert 0.05 < meter.compute().pck_bbox < 0.95
    assert result.metrics["pck_bbox"] == pytest.approx(meter.compute().pck_bbox)
    assert result.metrics["points"] == meter.compute().points


def test_a_convolution_learns_what_nearest_neighbours_cannot_tell():
    task = planted.task(beside_it=True)
    nearest, learnt = (train_correspondence(task, config).metrics for config in (NN, CONV))
    assert nearest["pck_bbox"] < 0.5
    assert learnt["pck_bbox"] > 0.8
    assert learnt["steps"] == 60


@pytest.mark.parametrize("negatives", ["grid", "points"])
@pytest.mark.parametrize("conv", [False, True])
def test_assigners_choose_the_run_that_knows(negatives, conv):
    task = planted.task(count=2, signal_runs=(1,), beside=True)
    config = dataclasses.replace(CONV, conv=conv, negatives=negatives, assigners=2, learning_rate=1e-2)
    result = train_correspondence(task, config)
    assert np.mean(result.losses[-10:]) < 0.8 * np.mean(result.losses[:10])
    weights = np.array(result.metrics["assigner_weights"]["fine.map"])
    assert weights.shape == (2, 2)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert weights[:, 1].mean() > 0.54  # most of a map is neither's point
    assert result.metrics["pck_bbox"] > 0.8


def test_each_assigner_has_a_convolution_of_its_own():
    features = planted.task(count=2, beside=True).features
    head = CorrespondenceHead.untrained(features.spec(), dataclasses.replace(CONV, assigners=3), seed=0)
    mixed = torch.randn(1, 18, 8, 8, generator=torch.Generator().manual_seed(0))  # 3 assigners x 6 channels
    other = mixed.clone()
    other[:, 6:12] += 1
    fine = head.net.convs[1]
    changed = (fine(mixed) != fine(other)).flatten(2).any(2)[0]
    assert changed.tolist() == [False] * 16 + [True] * 16 + [False] * 16
    assert [conv(torch.zeros(1, conv.in_channels, 4, 4)).shape[1] for conv in head.net.convs] == [48, 48, 16]


def test_the_same_seed_gives_the_same_head_and_another_one_another():
    task = planted.task()
    heads = [train_correspondence(task, CONV, seed=seed) for seed in (0, 0, 1)]
    assert heads[0].losses == heads[1].losses
    assert heads[0].losses != heads[2].losses
    assert heads[0].metrics == heads[1].metrics


def test_few_images_train_few_steps():
    task = planted.task()
    progress = []
    config = dataclasses.replace(CONV, max_steps=None, image_steps=2, mix_steps=7)
    result = train_correspondence(task, config, progress=lambda *step: progress.append(step))
    assert result.metrics["steps"] == 2 * 2 * 12
    assert progress[-1] == (48, 48)
    assert train_correspondence(task, dataclasses.replace(config, epoch_steps=5)).metrics["steps"] == 10
    few = planted.task(train_pairs=task.train_pairs[:3])
    assert train_correspondence(few, config).metrics["steps"] == 6


def test_the_loss_of_a_pair_worked_apart():
    task = planted.task()
    head = CorrespondenceHead.untrained(task.features.spec(), NN, seed=0)
    generator = torch.Generator().manual_seed(0)
    layers = {
        "coarse": torch.randn(2, 6, 4, 4, generator=generator),
        "fine": torch.randn(2, 5, 8, 8, generator=generator),
    }
    cells = torch.tensor([[[1, 2], [5, 5], [7, 0]], [[3, 3], [0, 6], [2, 2]]])  # x and y of three points in both images
    xy = (cells + 0.5) / 8
    whole = functional.interpolate(layers["coarse"], (8, 8), mode="bilinear", align_corners=False)
    whole = functional.normalize(torch.cat([whole, layers["fine"]], 1), dim=1)
    vectors = [torch.stack([whole[i][:, y, x] for x, y in cells[i]]) for i in range(2)]
    for negatives in ("grid", "points"):
        head.config = dataclasses.replace(NN, negatives=negatives)
        wanted = 0.0
        for here, there in ((0, 1), (1, 0)):
            for number, (x, y) in enumerate(cells[there].tolist()):
                choices = whole[there].flatten(1).T if negatives == "grid" else vectors[there]
                logits = choices @ vectors[here][number] / 0.07
                partner = logits[y * 8 + x] if negatives == "grid" else logits[number]
                wanted += (float(torch.logsumexp(logits, 0)) - float(partner)) / 6
        found = pair_loss(head, layers, xy[0], xy[1])
        assert found.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("count", "conv"), [(1, False), (1, True), (2, False), (2, True)])
def test_a_saved_head_finds_bit_for_bit_the_same(tmp_path, count, conv):
    task = planted.task(count=count, beside=True)
    result = train_correspondence(task, dataclasses.replace(CONV, conv=conv, max_steps=5, grid=(9, 11)))
    save_head(tmp_path / "head", result.head, metrics=result.metrics)
    loaded = load_head(tmp_path / "head")
    assert isinstance(loaded, CorrespondenceHead)
    assert loaded.config == result.head.config
    assert loaded.facts == {"grid": [9, 11]}
    points = np.random.default_rng(0).random((7, 2))
    before, after = (match(head, task.features, 0, 2, points) for head in (result.head, loaded))
    assert before.xy.tobytes() == after.xy.tobytes()
    assert before.cosine.tobytes() == after.cosine.tobytes()
    again = score_correspondence(task, loaded)
    assert again == {name: result.metrics[name] for name in again}


def test_matches_are_places_on_the_grid_and_a_point_finds_itself():
    task = planted.task()
    head = train_correspondence(task, NN).head
    assert head.grid == (16, 16)
    xy = np.array([[0.03125, 0.03125], [0.65625, 0.28125]], np.float32)  # centres of positions (0, 0) and (10, 4)
    found = match(head, task.features, 5, 5, xy)
    np.testing.assert_allclose(found.xy, xy)
    np.testing.assert_allclose(found.cosine, 1, atol=1e-5)
    assert match(head, task.features, 5, 7, np.empty((0, 2))).xy.shape == (0, 2)


def test_matches_are_what_is_scored():
    task = planted.task(noise=0.7)
    result = train_correspondence(task, NN)
    meter = CorrespondenceMeter()
    for source, target in task.test_pairs.tolist():
        here, there = shared(task.points[source], task.points[target])
        found = match(result.head, task.features, source, target, task.points[source].xy[here])
        truth = task.points[target]
        meter.update(found.xy * [80, 40], truth.xy_px[there], size_px=truth.size_px, box_px=truth.box_px)
    assert result.metrics["pck_bbox"] == pytest.approx(meter.compute().pck_bbox)
    assert result.metrics["pck_bbox_auc"] == pytest.approx(meter.compute().pck_bbox_auc)


@pytest.mark.parametrize("points", [np.array([[0.5, 1.2]]), np.array([[math.nan, 0]]), np.array([0.5, 0.5])])
def test_points_outside_the_image_are_refused(points):
    task = planted.task()
    with pytest.raises(BadRequestError, match=r"in 0\.\.1"):
        match(train_correspondence(task, NN).head, task.features, 0, 2, points)


def test_rows_outside_and_other_features_are_refused():
    task = planted.task()
    head = train_correspondence(task, NN).head
    with pytest.raises(BadRequestError, match="row 20"):
        match(head, task.features, 0, 20, np.zeros((1, 2)))
    with pytest.raises(IncompatibleError, match="number of runs"):
        match(head, planted.task(count=2).features, 0, 1, np.zeros((1, 2)))
    with pytest.raises(IncompatibleError, match="layers"):
        score_correspondence(
            dataclasses.replace(task, features=Features(maps=[{"coarse": task.features.maps[0]["coarse"]}])), head
        )


def test_points_in_common_are_visible_in_both():
    one, two = planted.points()[0], planted.points()[2]  # the first hides its nose, the second its left hoof
    here, there = shared(one, two)
    assert [one.names[n] for n in here] == ["eye", "right hoof", "tail"]
    assert here.tolist() == there.tolist()
    other = ImagePoints(
        names=("tail", "eye", "horn"),
        xy=np.zeros((3, 2), np.float32),
        visible=np.array([True, True, True]),
        size_px=(10, 10),
        box_px=(0, 0, 5, 5),
        category="cow",
    )
    here, there = shared(one, other)
    assert [one.names[n] for n in here] == [other.names[n] for n in there] == ["eye", "tail"]


def test_the_mirror_exchanges_left_and_right():
    assert mirrored_name("left front hoof") == "right front hoof"
    assert mirrored_name("eye_r") == "eye_l"
    assert [mirrored_name(name) for name in ("nose", "near fore hoof", "copyright", "3")] == [
        "nose",
        "near fore hoof",
        "copyright",
        "3",
    ]
    one = planted.points()[0]
    here, there = shared(one, one, mirrored=True)
    assert [(one.names[a], one.names[b]) for a, b in zip(here, there, strict=True)] == [
        ("eye", "eye"),
        ("left hoof", "right hoof"),
        ("right hoof", "left hoof"),
        ("tail", "tail"),
    ]


def test_a_mirrored_target_has_its_maps_turned_and_the_source_has_not():
    maps = read_maps(planted.task(beside=True).features, [3, 4])
    turned = mirrored_target(maps)
    for name, value in [*maps.layers.items(), *maps.beside.items()]:
        other = (turned.layers | turned.beside)[name]
        assert torch.equal(other[0], value[0])
        assert torch.equal(other[1], torch.flip(value[1], [-1]))
        assert not torch.equal(other[1], value[1])


def test_mirrored_steps_see_points_at_mirrored_places(monkeypatch):
    """With every target mirrored, the vectors at the points are those of the points that change places."""
    task = planted.task()
    seen = []

    def loss(head, layers, source_xy, target_xy):
        seen.append((source_xy, target_xy))
        return pair_loss(head, layers, source_xy, target_xy)

    monkeypatch.setattr("featstore.heads.correspondence_training.pair_loss", loss)
    one = planted.task(train_pairs=np.array([[0, 2]]), test_pairs=task.test_pairs[:1])
    train_correspondence(one, dataclasses.replace(CONV, max_steps=1, mirror=1.0))
    source, target = task.points[0], task.points[2]
    # left hoof of the source (visible) is now the target's right one, whose own left one is hidden
    names = [("eye", "eye"), ("left hoof", "right hoof"), ("tail", "tail")]
    np.testing.assert_allclose(seen[0][0], [source.xy[planted.NAMES.index(a)] for a, _ in names])
    wanted = np.array([target.xy[planted.NAMES.index(b)] for _, b in names])
    wanted[:, 0] = 1 - wanted[:, 0]
    np.testing.assert_allclose(seen[0][1], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"train_pairs": np.array([[0, 1]])}, "'cow' and 'horse'"),
        ({"train_pairs": np.array([[0, 0]])}, "paired with itself"),
        ({"test_pairs": np.array([[0, 22]])}, "row 22 is outside"),
        ({"test_pairs": np.array([0, 2])}, "are (n, 2)"),
        ({"points": {0: planted.points()[0]}}, "has no points"),
    ],
)
def test_tasks_whose_parts_do_not_fit_are_refused(change, text):
    with pytest.raises(BadRequestError) as caught:
        planted.task(**change)
    assert text in str(caught.value)


def test_a_pair_without_a_common_point_is_refused():
    where = planted.points()
    where[2] = dataclasses.replace(where[2], visible=~where[0].visible)
    with pytest.raises(BadRequestError, match="no visible point in common"):
        planted.task(points=where)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(BadRequestError, match="no training pairs"):
        train_correspondence(planted.task(train_pairs=np.empty((0, 2), np.int64)), NN)


def test_without_test_pairs_there_is_a_head_and_no_score():
    metrics = train_correspondence(planted.task(test_pairs=np.empty((0, 2), np.int64)), NN).metrics
    assert metrics["pck_img"] is None
    assert metrics["test_images"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"assigners": 0},
        {"max_steps": 0},
        {"learning_rate": 0.0},
        {"gamma1": -1.0},
        {"mirror": 1.5},
        {"negatives": "gird"},
        {"grid": (0, 3)},
        {"window_bytes": 0},
    ],
)
def test_settings_that_no_training_can_have_are_refused(change):
    with pytest.raises(BadRequestError, match=next(iter(change)).split("_")[0]):
        CorrespondenceConfig(**change)


@pytest.mark.parametrize(
    "change",
    [{"xy": np.zeros((2, 2), np.float32)}, {"visible": np.ones(3, bool)}, {"xy": np.full((5, 2), 1.5, np.float32)}],
)
def test_points_that_do_not_fit_their_names_are_refused(change):
    with pytest.raises(BadRequestError):
        dataclasses.replace(planted.points()[0], **change)

"""Sampled pixels: which they are, their vectors beside F.interpolate, and a head that is trained on them."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional

import featstore
from featstore.errors import BadRequestError
from featstore.heads import Features, PixelHeadConfig, SegmentationTask, train_segmentation
from featstore.heads.sampled import Gathering, PixelSample, SampledTables, draw_pixels
from featstore.heads.standardise import Standardise
from tests import test_loader

SIZE = (8, 12)


@pytest.fixture(scope="module")
def gathering(tmp_path_factory):
    place = str(tmp_path_factory.mktemp("sampled") / "s.zarr")
    test_loader.fill(place)
    basic, prompt = featstore.open(place).dataset("made-up").bucket(["basic", "prompt"]).runs
    return Gathering(
        runs=tuple({name: run.reader(name) for name in test_loader.SHAPES} for run in (basic, prompt)),
        beside={"prompt/fine": prompt.reader("fine")},
        size=SIZE,
    )


def upsampled(run, name, row):
    maps = torch.from_numpy(test_loader.values(run, name, [row]))
    return functional.interpolate(maps, SIZE, mode="bilinear", align_corners=False)[0].flatten(1).T


def test_vectors_are_those_of_upsampled_maps(gathering):
    rows, pixels = [3, 140], [np.array([0, 17, 95]), np.array([40])]
    runs, beside = pickle.loads(pickle.dumps(gathering))(rows, pixels)
    assert (runs.shape, beside.shape) == ((4, 2, 5), (4, 2))
    assert gathering.pixel_bytes == 4 * (2 * 5 + 2)
    for number in range(2):
        want = torch.cat(
            [
                torch.cat([upsampled(number, name, row)[some] for name in test_loader.SHAPES], 1)
                for row, some in zip(rows, pixels, strict=True)
            ]
        )
        torch.testing.assert_close(torch.from_numpy(runs[:, number]), want, atol=1e-4, rtol=1e-5)
    want = torch.cat([upsampled(1, "fine", row)[some] for row, some in zip(rows, pixels, strict=True)])
    torch.testing.assert_close(torch.from_numpy(beside), want, atol=1e-4, rtol=1e-5)


def test_pixels_are_labelled_ones_drawn_by_seed_and_row():
    labels = np.random.default_rng(0).integers(0, 3, SIZE).astype(np.uint8)
    labels[:4] = 255
    drawn = draw_pixels(labels, 20, seed=1, row=7)
    assert len(set(drawn.tolist())) == 20
    assert (np.diff(drawn) > 0).all()
    assert (labels.reshape(-1)[drawn] != 255).all()
    np.testing.assert_array_equal(drawn, draw_pixels(labels, 20, seed=1, row=7))
    assert drawn.tolist() != draw_pixels(labels, 20, seed=1, row=8).tolist()
    assert drawn.tolist() != draw_pixels(labels, 20, seed=2, row=7).tolist()
    np.testing.assert_array_equal(draw_pixels(labels, 1000, seed=1, row=7), np.arange(48, 96))


def test_every_pixel_is_as_likely():
    labels = np.zeros((4, 5), np.uint8)
    counts = np.zeros(20)
    for row in range(4000):
        counts[draw_pixels(labels, 5, seed=0, row=row)] += 1
    # 1,000 each are expected, with a deviation of 27.
    assert abs(counts - 1000).max() < 120


def test_tables_standardise_what_they_gather():
    rng = np.random.default_rng(0)
    runs, beside = rng.normal(3, 2, (5000, 2, 4)).astype(np.float32), rng.normal(-1, 5, (5000, 3)).astype(np.float32)
    tables = SampledTables(
        PixelSample(runs=runs.copy(), beside=beside.copy(), labels=np.zeros(5000, np.uint8), images=9), "cpu"
    )
    assert tables.width == 11
    (mean, deviation), (beside_mean, beside_deviation) = tables.moments()
    np.testing.assert_allclose(mean, runs.astype(np.float64).mean(0), atol=1e-5)
    np.testing.assert_allclose(deviation, runs.astype(np.float64).std(0), atol=1e-5)
    np.testing.assert_allclose(beside_mean, beside.astype(np.float64).mean(0), atol=1e-5)
    np.testing.assert_allclose(beside_deviation, beside.astype(np.float64).std(0), atol=1e-5)
    by = Standardise(2, 4, 3)
    by.fit((mean, deviation), (beside_mean, beside_deviation))
    tables.standardise(by)
    pixels = torch.tensor([7, 7, 4999, 0])
    got = tables.gather(pixels, tables.empty(4))
    want = by(torch.from_numpy(runs)[pixels], torch.from_numpy(beside)[pixels])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_a_head_learns_from_a_few_pixels_of_each_image():
    """What is planted in the maps is found as well from 20 of 64 pixels an image."""
    import dask.array as da

    rng = np.random.default_rng(0)
    masks = rng.integers(0, 2, (24, 8, 8)).astype(np.uint8)
    maps = rng.normal(0, 0.3, (24, 3, 8, 8)).astype(np.float32)
    maps[:, 1] += masks
    features = Features(maps=[{"layer": da.from_array(maps, chunks=(4, 3, 8, 8))}])
    task = SegmentationTask(
        features=features, masks=masks, train_rows=range(16), test_rows=range(16, 24), classes=("no", "yes")
    )
    pixels = [draw_pixels(masks[row], 20, seed=0, row=row) for row in range(16)]
    sample = PixelSample(
        runs=np.concatenate([maps[row].reshape(3, -1).T[some] for row, some in enumerate(pixels)])[:, None],
        beside=np.empty((320, 0), np.float32),
        labels=np.concatenate([masks[row].reshape(-1)[some] for row, some in enumerate(pixels)]),
        images=16,
    )
    config = PixelHeadConfig(members=2, max_steps=150)
    few, all_of_them = (train_segmentation(task, config, sample=one).metrics["miou"] for one in (sample, None))
    # The best that there is: half of the difference is 1.7 deviations away.
    assert few > 0.8
    assert abs(few - all_of_them) < 0.08


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(BadRequestError, match="3 labels"):
        PixelSample(
            runs=np.empty((2, 1, 1), np.float32),
            beside=np.empty((2, 0), np.float32),
            labels=np.zeros(3, np.uint8),
            images=1,
        )

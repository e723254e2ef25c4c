import numpy as np
import pytest

from featstore.errors import BadRequestError
from featstore.heads import train_segmentation
from featstore.heads.labels import PackedLabels, PackedMap
from featstore.heads.pixels import PixelHeadConfig
from tests.heads import planted


def test_packed_maps_come_back_as_they_were_and_rows_without_one_are_ignored():
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 256, (3, 7, 5)).astype(np.uint8)
    turned = masks[2].T.copy().T  # not contiguous
    labels = PackedLabels([PackedMap(masks[0]), None, PackedMap(turned)], (7, 5), ignore_label=9)
    assert labels.shape == (3, 7, 5)
    assert len(labels) == 3
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels[0], masks[0])
    np.testing.assert_array_equal(labels[1], np.full((7, 5), 9))
    np.testing.assert_array_equal(labels[2], masks[2])
    with pytest.raises(ValueError, match="read-only"):
        labels[1][0, 0] = 1
    with pytest.raises(IndexError):
        labels[3]


def test_a_map_of_areas_takes_a_few_percent():
    mask = np.zeros((512, 512), np.uint8)
    for label in range(1, 30):
        mask[label * 17 % 400 :, label * 41 % 400 :] = label
    assert len(PackedMap(mask)._data) < mask.size / 50


def test_maps_of_other_sizes_are_refused_with_their_row():
    good, bad = PackedMap(np.zeros((2, 2), np.uint8)), PackedMap(np.zeros((2, 3), np.uint8))
    with pytest.raises(BadRequestError, match=r"row 1 is \(2, 3\), not \(2, 2\)"):
        PackedLabels([good, bad], (2, 2))


def test_a_pixel_head_trains_on_packed_labels_to_the_same_bits():
    task = planted.task()
    packed = planted.task(masks=PackedLabels([PackedMap(mask) for mask in task.masks], task.masks.shape[1:]))
    config = PixelHeadConfig(members=1, max_steps=20)
    first, second = (train_segmentation(one, config) for one in (task, packed))
    assert first.metrics == second.metrics
    assert all(map(np.array_equal, first.head.tensors().values(), second.head.tensors().values()))

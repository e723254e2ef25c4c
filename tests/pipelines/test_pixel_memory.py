"""What a pixel head cannot hold is refused before it is read."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest

from featstore.errors import BadRequestError
from featstore.heads import Features, SegmentationTask
from featstore.pipelines.progress import Silent
from featstore.pipelines.tasks.base import HeadSettings
from featstore.pipelines.tasks.segmentation import Segmentation

IMAGES = 20_000


class _Prepared(Segmentation):
    """The task of a data set of real size, whose maps nobody could read."""

    def __init__(self, head_maps):
        self._maps = head_maps

    def task(self, train, test):
        masks = np.broadcast_to(np.eye(8, dtype=np.uint8), (IMAGES, 8, 8))
        return SegmentationTask(
            features=Features(maps=[self._maps]),
            masks=masks,
            train_rows=train.tolist(),
            test_rows=test.tolist(),
            classes=("a", "b"),
        )


def _never(block):
    raise AssertionError("a map was read")


def test_maps_beyond_memory_are_refused_with_the_head_that_streams_them():
    shape = (IMAGES, 1280, 512, 512)
    huge = da.zeros(shape, chunks=(1, *shape[1:]), dtype=np.float16).map_blocks(_never, dtype=np.float16)
    with pytest.raises(BadRequestError, match=r"holds the maps of its 10000 training images, 6710\.9 GB") as raised:
        _Prepared({"layer": huge}).train(
            (np.arange(10_000), np.arange(10_000, 10_002)), HeadSettings(head="pixel"), Silent(), "training"
        )
    assert "--head upernet" in raised.value.hint

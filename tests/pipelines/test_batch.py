from __future__ import annotations

import pytest

from featstore import models
from featstore.pipelines.batch import cpu_batch_size, fitting

MIB = 1 << 20


@pytest.mark.parametrize(
    ("one", "two", "room", "rows"),
    [
        (100, 150, 50, 1),  # not even one is known to fit: one is tried
        (100, 150, 149, 1),
        (100, 150, 150, 2),
        (100, 150, 299, 4),  # room for 4.98 rows
        (100, 150, 450, 8),
        (100, 150, 10**6, 64),  # never more than 64
        (100, 100, 101, 2),  # a row that takes nothing is counted as a byte
    ],
)
def test_the_largest_power_of_two_that_fits(one: int, two: int, room: int, rows: int) -> None:
    assert fitting(one, two, room) == rows


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("height", "width", "rows"), [(64, 64, 16), (1024, 1024, 1), (256, 512, 8), (4096, 4096, 1)])
def test_on_a_cpu_large_images_take_smaller_batches(height: int, width: int, rows: int) -> None:
    # Latents are a quarter of the image a side: 256 x 512 px are 64 x 128 positions.
    assert cpu_batch_size(models.resolve("reference"), height, width) == rows

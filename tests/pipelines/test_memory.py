"""Host memory of an extraction does not grow with the data set."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

LAYERS = ",".join(
    [f"down-level0-repeat{j}-vit-block0-self-map" for j in range(2)]
    + [f"up-level3-repeat{j}-vit-block0-self-map" for j in range(3)]
)
BYTES_PER_IMAGE = 5 * 256 * 256 * 4
QUEUE_BYTES = 512 << 20
BLOCK_IMAGES = 64


def peak_rss_bytes(images: Path, store: Path, limit: int) -> int:
    words = ["--dataset", f"folder:{images}", "--model", "reference", "--techniques", "basic", "--layers", LAYERS]
    words += ["--precision", "float32"]
    words += ["--limit", str(limit), "--store", str(store), "--device", "cpu", "--json"]
    command = [sys.executable, "-m", "featstore.cli", "extract", *words]
    done = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert [run["computed"] for run in done["runs"]] == [limit]
    assert done["runs"][0]["bytes"] == limit * BYTES_PER_IMAGE
    peak: int = done["peak_rss_bytes"]
    return peak


@pytest.mark.full
@pytest.mark.usefixtures("tiny")
def test_a_thousand_images_take_no_more_memory_than_is_said(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for index in range(1000):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(images / f"{index:04d}.png")
    few = peak_rss_bytes(images, tmp_path / "few.zarr", 16)
    many = peak_rss_bytes(images, tmp_path / "many.zarr", 1000)
    bound = QUEUE_BYTES + 3 * BLOCK_IMAGES * BYTES_PER_IMAGE
    assert 1.5 * bound < 1000 * BYTES_PER_IMAGE, "a queue without a bound would show"
    assert many - few < bound

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featstore.models
from featstore.errors import NotFoundError
from featstore.pipelines.plan import ExtractConfig
from tests.chromium import visit

__all__ = ["visit"]


@pytest.fixture
def config(photos, tmp_path):
    """Makes the configuration of an extraction of ``photos`` with a few changes."""

    def make(**changes):
        values = {
            "dataset": f"folder:{photos}",
            "techniques": "basic",
            "store": str(tmp_path / "features.zarr"),
            "model": "reference",
            "device": "cpu",
            "batch_size": 4,
        }
        return ExtractConfig(**(values | changes))

    return make


@pytest.fixture
def absent(monkeypatch):
    """Makes a model's weights absent, as on a machine that has the features only."""

    def remove(name):
        def missing(asked, **_):
            raise NotFoundError(f"the weights of model {asked!r} are not there")

        assert featstore.models.resolve(name)
        monkeypatch.setattr(featstore.models, "resolve", missing)
        monkeypatch.setattr(featstore.models, "describe", missing)

    return remove


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 noisy images of 64 px: four blocks a run."""
    folder = tmp_path_factory.mktemp("many")
    generator = np.random.default_rng(0)
    for number in range(200):
        values = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture
def wanted(many: Path, tiny: None):
    def make(store: Path, **changes) -> ExtractConfig:
        values = {
            "dataset": f"folder:{many}",
            "techniques": "basic,controlnet",
            "store": str(store),
            "model": "reference",
            "device": "cpu",
            "batch_size": 8,
        }
        return ExtractConfig(**(values | changes))

    return make

from __future__ import annotations

import pytest

import featstore.models
from featstore.errors import NotFoundError
from featstore.pipelines.plan import ExtractConfig


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

"""An image is given by its key and digest to who has not listed the data set: the same pixels, or an error."""

from __future__ import annotations

import datasets
import numpy as np
import pytest

from featstore.datasets import UnreadableImageError, resolve
from featstore.datasets.like import Like
from tests.datasets.test_cifar10 import write_binaries, write_pictures
from tests.datasets.test_hub import table


@pytest.fixture(params=["folder", "like", "toyhorse", "binaries", "pictures", "hub"])
def dataset(request, photos, tmp_path, tmp_path_factory, monkeypatch):
    if request.param in ("folder", "like"):
        made = resolve(f"folder:{photos}")
        return made if request.param == "folder" else Like(made, resolve("toyhorse").info)
    if request.param == "toyhorse":
        return resolve("toyhorse")
    if request.param == "hub":
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        table(range(4)).save_to_disk(tmp_path / "table")
        return resolve(f"hub:{tmp_path / 'table'}")
    if request.param == "binaries":
        write_binaries(tmp_path / "cifar-10-batches-bin")
    else:
        write_pictures(tmp_path / "cifar10")
    return resolve("cifar10", data_root=tmp_path)


def test_the_same_pixels_or_an_error(dataset):
    one, other = dataset.samples[0], dataset.samples[1]
    assert np.array_equal(dataset.image_as(one.key, one.digest), dataset.image(one.key))
    with pytest.raises(UnreadableImageError, match="not those that were listed"):
        dataset.image_as(one.key, other.digest)


def test_a_file_that_is_gone(photos):
    dataset = resolve(f"folder:{photos}")
    sample = dataset.samples[3]
    dataset.path(sample.key).unlink()
    with pytest.raises(UnreadableImageError, match="there is no such file"):
        dataset.image_as(sample.key, sample.digest)

"""ResNet-50 on tiny pictures: few steps, as it is large."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from featstore.datasets import Dataset, DatasetInfo, Sample, UnreadableImageError
from featstore.errors import BadRequestError, IncompatibleError
from featstore.heads import ClassificationTask, Features
from featstore.pipelines.baseline import BaselineConfig, Images, _inputs, _network, _orders, train_baseline

COUNT, SIDE = 18, 32


class Stripes(Dataset):
    """Pictures of bright or dark noise; the label says which."""

    def __init__(self):
        self.reads = []

    info = DatasetInfo(name="stripes", title="t", plain_prompt="p", source="s", image_classes=("dark", "bright"))
    samples = tuple(Sample(key=str(k), digest=f"{k:064x}", split="all") for k in range(COUNT))

    def image(self, key):
        self.reads.append(key)
        if key == "17":
            raise UnreadableImageError("17: gone")
        noise = np.random.default_rng(int(key)).integers(0, 90, (SIDE, SIDE, 3))
        return (noise + 150 * (int(key) % 2)).astype(np.uint8)

    def mask(self, key):
        return None


def images(dataset=None, **changes):
    dataset = dataset or Stripes()
    return Images(dataset, [sample.key for sample in dataset.samples], SIDE, SIDE, **changes)


def task(**changes):
    maps = {"layer": da.zeros((COUNT, 1, 1, 1), dtype=np.float16)}  # no feature is looked at
    values = {"train_rows": range(12), "test_rows": range(12, 17), "labels": np.arange(COUNT) % 2}
    return ClassificationTask(features=Features(maps=[maps]), classes=("dark", "bright"), **(values | changes))


def config(**changes):
    return BaselineConfig(**({"batch_size": 6, "least_steps": 2, "epochs": 1} | changes))


def test_it_learns_what_can_be_seen():
    done = []
    metrics = train_baseline(
        images(), task(), config(batch_size=4, least_steps=8), progress=lambda *steps: done.append(steps)
    )
    assert metrics["accuracy"] == 1
    assert (metrics["train_images"], metrics["test_images"], metrics["steps"]) == (12, 5, 8)
    assert done == [(5, 8), (8, 8)]


def test_the_same_seed_gives_the_same_scores_whatever_was_drawn_before():
    def score(seed):
        torch.rand(5)
        return train_baseline(images(), task(), config(max_steps=1), seed=seed)

    first, again, other = score(0), score(0), score(1)
    assert first == again
    assert first != other


def test_weights_from_a_file_are_what_is_begun_with(tmp_path):
    torch.manual_seed(3)
    other = timm.create_model("resnet50", pretrained=False, num_classes=7)
    save_file(other.state_dict(), tmp_path / "model.safetensors")
    net = _network(config(weights=tmp_path / "model.safetensors"), 2, seed=0)
    own, given = net.state_dict(), other.state_dict()
    assert own["fc.weight"].shape == (2, 2048)
    assert all(torch.equal(value, given[name]) for name, value in own.items() if not name.startswith("fc."))
    random = _network(config(), 2, seed=0).state_dict()
    assert torch.equal(own["fc.weight"], random["fc.weight"])
    assert not torch.equal(own["conv1.weight"], random["conv1.weight"])
    # with as many classes the last layer is taken over, too
    whole = _network(config(weights=tmp_path / "model.safetensors"), 7, seed=0).state_dict()
    assert torch.equal(whole["fc.bias"], given["fc.bias"])


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    given = timm.create_model("resnet18", pretrained=False, num_classes=2).state_dict()
    save_file(given, path)
    with pytest.raises(IncompatibleError, match="another network"):
        train_baseline(images(), task(), config(weights=path))
    whole = timm.create_model("resnet50", pretrained=False, num_classes=2).state_dict()
    del whole["layer1.0.conv1.weight"]
    save_file(whole, path)
    with pytest.raises(IncompatibleError, match=r"'layer1\.0\.conv1\.weight' does not fit"):
        train_baseline(images(), task(), config(weights=path))
    path.write_bytes(b"no safetensors")
    with pytest.raises(BadRequestError, match="cannot read the weights"):
        train_baseline(images(), task(), config(weights=path))


def test_weights_that_are_not_there_or_could_run_code_are_refused_at_once(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"")
    with pytest.raises(BadRequestError, match=r"model\.pth is no \.safetensors file"):
        config(weights=tmp_path / "model.pth")
    with pytest.raises(BadRequestError, match="does not exist"):
        config(weights=tmp_path / "model.safetensors")
    with pytest.raises(BadRequestError, match="unknown baseline 'resnet51'; known: resnet50"):
        config(name="resnet51")
    with pytest.raises(BadRequestError, match="batch_size 1 must be 4 or more"):
        config(batch_size=1)


def test_images_come_in_order_and_are_decoded_once_while_they_fit():
    orders = [[3, 1], [0], [2, 3], [1]]
    for kept, reads in ((2**20, 4), (3 * SIDE * SIDE, 5), (0, 6)):
        dataset = Stripes()
        found = list(images(dataset, kept_bytes=kept).batches(map(np.array, orders)))
        assert [rows.tolist() for rows, _ in found] == orders
        for rows, pixels in found:
            np.testing.assert_array_equal(pixels, np.stack([Stripes().image(str(row)) for row in rows]))
        assert len(dataset.reads) == reads


def test_images_are_brought_to_the_size_of_the_features():
    (_, pixels), *_ = Images(Stripes(), [str(k) for k in range(COUNT)], 48, 64).batches(iter([np.array([1, 2])]))
    assert (pixels.shape, pixels.dtype) == ((2, 48, 64, 3), np.uint8)


def test_pixels_are_standardised_as_torchvision_does():
    from torchvision.transforms.functional import normalize, to_tensor

    pixels = np.stack([Stripes().image("0"), Stripes().image("1")])
    expected = [normalize(to_tensor(p), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for p in pixels]
    torch.testing.assert_close(_inputs(pixels, "cpu"), torch.stack(expected))


@pytest.mark.parametrize("count", range(2, 15))
def test_no_batch_is_of_one_image_or_too_large(count):
    rows = np.arange(100, 100 + count)
    orders = list(_orders(rows, 4, 40, seed=0))
    assert len(orders) == 40
    assert all(2 <= len(order) <= 4 for order in orders)
    an_epoch = -(-count // 4)
    first, second = (np.concatenate(orders[start : start + an_epoch]) for start in (0, an_epoch))
    assert sorted(first) == sorted(second) == rows.tolist()
    assert count < 5 or first.tolist() != second.tolist()


def test_a_picture_that_cannot_be_read_says_so():
    with pytest.raises(UnreadableImageError, match="17: gone"):
        train_baseline(images(), task(test_rows=[17]), config())


def test_what_cannot_be_trained_on_is_refused_before_anything_is_read():
    dataset = Stripes()
    with pytest.raises(BadRequestError, match="one class"):
        train_baseline(images(dataset), task(train_rows=[0, 2, 4]), config())
    assert not dataset.reads

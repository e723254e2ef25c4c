"""What can be picked from a store, what is shown of it, and the address that it is shown at."""

from __future__ import annotations

import builtins
import re
import socket
import sys

import numpy as np
import pytest
from PIL import Image

import featstore.store
from featstore.errors import BadRequestError, NotFoundError
from featstore.pictures import nearest
from featstore.pipelines.browse import BrowseConfig, browse
from featstore.pipelines.browse.server import _origins
from featstore.pipelines.browse.shelf import Shelf
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig

LAYER = "up-level1-upsampler-out"


@pytest.fixture
def shelf(features, labelled):
    return Shelf(featstore.store.open(str(features)), dataset=f"folder:{labelled}")


@pytest.fixture
def book(shelf):
    return shelf.take("discs")


def test_what_there_is_to_pick(book, features):
    assert book.techniques == ["basic", "prompt"]
    assert book.timesteps == [50]
    assert book.usual_timestep == 50
    assert set(book.keys()) == {*(f"train/{n}.png" for n in range(5)), *(f"test/{n}.png" for n in range(5, 8))}
    runs = book.chosen(["basic", "prompt"], 50)
    layers = book.layers(runs)
    assert LAYER in layers
    assert not [name for name in layers if name.startswith("attn")]
    assert book.usual_layer(runs) in layers
    assert book.chosen(["basic"], 51) == {}
    assert book.layers({}) == sorted(layers)
    assert book.usual_layer({}) in layers


def test_pictures_have_one_basis_that_stays_while_images_are_picked(book):
    runs = book.chosen(["basic", "prompt"], 50)
    first = book.view(runs, LAYER, ["train/0.png", "train/1.png"])
    again = book.view(runs, LAYER, ["train/1.png", "test/5.png"])
    assert set(first) == {"basic", "prompt"}
    np.testing.assert_array_equal(first["basic"][1], again["basic"][0])
    assert first["basic"][0].shape[2] == 3
    assert len(np.unique(first["basic"][0].reshape(-1, 3), axis=0)) > 5


def test_a_match_is_that_of_the_stored_maps(book, features):
    run = book.chosen(["prompt"], 50)["prompt"]
    match = book.match(run, LAYER, "train/0.png", (40, 20), "test/6.png")
    stored = featstore.store.open(str(features)).dataset("discs")
    maps = stored.run("prompt").numpy(LAYER, [stored.row_of["train/0.png"], stored.row_of["test/6.png"]])
    expected = nearest(maps[0], (40, 20), (64, 64), maps[1], (64, 64))
    assert (match.y, match.x, match.cosine) == (expected.y, expected.x, expected.cosine)
    same = book.match(run, LAYER, "train/0.png", (40, 20), "train/0.png")
    assert same.cosine == pytest.approx(1)
    with pytest.raises(BadRequestError, match="outside the image of 64 x 64 px"):
        book.match(run, LAYER, "train/0.png", (64, 0), "test/6.png")


def test_images_are_shown_where_they_are_at_hand_and_the_same(book, features, labelled):
    np.testing.assert_array_equal(book.picture("train/0.png"), np.asarray(Image.open(labelled / "train/0.png")))
    without = Shelf(featstore.store.open(str(features))).take("discs")
    assert not without.has_images
    assert without.picture("train/0.png") is None
    run = next(iter(without.runs.values()))
    assert without.size("train/0.png", run) == (run.recipe.height_px, run.recipe.width_px)


@pytest.mark.usefixtures("tiny")
def test_an_image_without_features_is_shown_as_such_and_a_changed_one_not_at_all(photos, tmp_path):
    config = {"dataset": f"folder:{photos}", "store": str(tmp_path / "s.zarr"), "model": "reference", "device": "cpu"}
    extract(ExtractConfig(techniques="basic", limit=3, **config))
    extract(ExtractConfig(techniques="basic", timesteps=(200, 50), limit=2, **config))
    Image.new("RGB", (80, 60), (1, 2, 3)).save(photos / "01.png")
    book = Shelf(featstore.store.open(config["store"]), dataset=config["dataset"]).take("photos")
    assert book.usual_timestep == 50
    assert book.first_pair() == ("00.png", "01.png")
    assert book.picture("00.png").shape == (60, 80, 3)
    assert book.picture("01.png") is None
    runs = book.chosen(["basic"], 50)
    (pictures,) = book.view(runs, LAYER, ["00.png", "09.png"]).values()
    assert pictures[0] is not None
    assert pictures[1] is None
    assert book.match(runs["basic"], LAYER, "00.png", (0, 0), "09.png") is None


def test_what_is_not_there(shelf, book, features, tmp_path):
    runs = book.chosen(["basic"], 50)
    with pytest.raises(BadRequestError, match=r"'train/9\.png'"):
        book.view(runs, LAYER, ["train/9.png"])
    with pytest.raises(BadRequestError, match="unknown layer 'up-level1'"):
        book.view(runs, "up-level1", ["train/0.png"])
    with pytest.raises(BadRequestError, match="'toyhorse'; known: discs"):
        Shelf(featstore.store.open(str(features)), dataset="toyhorse")
    featstore.store.create(str(tmp_path / "empty.zarr"))
    with pytest.raises(NotFoundError, match="no features to browse") as caught:
        browse(BrowseConfig(store=str(tmp_path / "empty.zarr")))
    assert "featstore extract" in caught.value.hint


def test_a_port_that_is_taken_or_impossible(features):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadRequestError, match=f"127.0.0.1:{port}") as caught:
            browse(BrowseConfig(store=str(features), port=port))
    assert "--port" in caught.value.hint
    with pytest.raises(BadRequestError, match=r"0\.\.65535"):
        BrowseConfig(port=70000)


def test_pages_of_others_may_not_talk_to_it():
    assert _origins("127.0.0.1", 5) == ["127.0.0.1:5", "localhost:5"]
    assert "[::1]:5" in _origins("::1", 5)
    assert not [origin for origin in _origins("0.0.0.0", 5) if "*" in origin]


def test_without_bokeh_it_says_what_to_install(features, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "bokeh" or "browse.page" in name]:
        monkeypatch.delitem(sys.modules, name)
    genuine = builtins.__import__

    def without(name, *rest, **options):
        if name.partition(".")[0] == "bokeh":
            raise ImportError(name)
        return genuine(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NotFoundError, match="not installed") as caught:
        browse(BrowseConfig(store=str(features), port=0))
    assert re.search(r"pip install 'featstore\[browse\]'", caught.value.hint)

"""The browser in Chromium: pick, click a point, see its match; nothing is fetched from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import featstore.store
from featstore.pipelines.browse.shelf import Shelf
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig
from tests.chromium import PHONE

NASTY = "00 <img src=x onerror=alert(1)>$$x$$.png"
FOUND = re.compile(r"Point x (\d+), y (\d+) of (\S+) is found in (\S+) at")


@pytest.fixture
def serving():
    """Starts `featstore browse` in a process of its own and says where it is."""
    started = []

    def start(*options):
        command = [sys.executable, "-m", "featstore.cli", "browse", "--port", "0", *map(str, options)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=30)


def status(page):
    return page.locator("text=/Point|Click|nothing fits|unknown/").first


def click(page, number, *, x, y):
    """Click an upper picture at pixel (x, y) of its image of 64 px, until the page says so: it may just be redrawn."""
    for _ in range(20):
        box = page.locator(".bk-Figure").nth(number).bounding_box()
        scale = box["width"] / 64
        page.mouse.click(box["x"] + (x + 0.5) * scale, box["y"] + box["height"] - (64 - y - 0.5) * scale)
        page.wait_for_timeout(1000)
        if status(page).inner_text().startswith("Point"):
            return
    pytest.fail(f"no click was taken; the page says {status(page).inner_text()!r}")


def choose(page, label, key):
    """Type the name of an image, and leave the field."""
    page.get_by_label(label, exact=True).fill(key)
    page.get_by_label(label, exact=True).press("Enter")
    page.get_by_label(label, exact=True).blur()
    page.wait_for_timeout(1000)


def test_pick_click_and_see_the_match(visit, serving, features, labelled):
    url = serving("--store", features, "--dataset", f"folder:{labelled}")
    seen = visit(url)
    page = seen.page
    page.wait_for_selector(".bk-Figure")
    assert "Click a point" in status(page).inner_text()
    assert page.locator(".bk-Figure").count() == 2 * 3, "two images beside two techniques"

    page.get_by_label("layer").select_option("up-level1-upsampler-out")
    choose(page, "other image", "train/3.png")
    click(page, 2, x=20, y=40)
    point = FOUND.search(status(page).inner_text())
    x, y, source, target = int(point[1]), int(point[2]), point[3], point[4]
    assert abs(x - 20) <= 1
    assert abs(y - 40) <= 1
    assert (source, target) == ("test/5.png", "train/3.png")
    assert page.locator(".bk-Figure").count() == 2 * 4, "heat below each technique"

    book = Shelf(featstore.store.open(str(features)), dataset=f"folder:{labelled}").take("discs")
    said = page.locator("text=/basic: x/").first.inner_text()
    for name, run in book.chosen(["basic", "prompt"], 50).items():
        match = book.match(run, "up-level1-upsampler-out", source, (y, x), target)
        assert f"{name}: x {match.x}, y {match.y}, cosine {match.cosine:.3f}" in said

    choose(page, "other image", "train/9.png")
    page.wait_for_selector("text=/unknown image/")
    assert seen.complaints == []
    assert [one for one in seen.requests if not one.startswith(url)] == []


def test_it_fits_a_phone(visit, serving, features):
    seen = visit(serving("--store", features), size=PHONE)
    seen.page.wait_for_selector(".bk-Figure")
    assert seen.overflow_px() == 0
    assert seen.complaints == []


@pytest.mark.usefixtures("tiny")
def test_hostile_names_are_shown_as_text(visit, serving, photos, tmp_path):
    (photos / "00.png").rename(photos / NASTY)
    config = {"dataset": f"folder:{photos}", "store": str(tmp_path / "s.zarr"), "model": "reference", "device": "cpu"}
    extract(ExtractConfig(techniques="basic", limit=3, **config))
    seen = visit(serving("--store", config["store"], "--dataset", config["dataset"]))
    page = seen.page
    page.wait_for_selector(".bk-Figure")
    page.get_by_label("other image", exact=True).fill("00")
    page.wait_for_timeout(500)
    choose(page, "other image", NASTY)
    click(page, 0, x=30, y=20)
    assert NASTY in status(page).inner_text()
    assert page.locator("img[src='x']").count() == 0
    assert [one for one in seen.complaints if "dialog" in one or one == "x"] == []
    assert all(one.startswith("http://127.0.0.1") for one in seen.requests)

"""The report in Chromium: offline, on a phone, in the dark, without a word in the console."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from featstore.pictures import (
    Details,
    Interval,
    IntervalTable,
    Panel,
    PanelTable,
    Plate,
    Report,
    Score,
    ScoreTable,
    Table,
    write_report,
)
from featstore.pipelines.report import ReportConfig, make_report
from tests.chromium import DESKTOP, PHONE

LONG = "controlnet:./a/very/long/path/to/some/folder/of/weights+lora:./another/quite/long/name.safetensors"
NASTY = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def everything() -> Report:
    rng = np.random.default_rng(0)
    panels = tuple(
        Panel(title=f"{LONG} {n}", pictures=(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8),)) for n in range(9)
    )
    return Report(
        title=NASTY,
        lead=f"{LONG} {NASTY}",
        sections=(
            ScoreTable(title="scores", metric="mIoU", scores=(Score(name=LONG, mean=0.5, std=0.1, note=NASTY),)),
            IntervalTable(title=LONG, metric="score", intervals=(Interval(name=LONG, value=-0.5, low=-1.0, high=0.1),)),
            PanelTable(title="pictures", panels=panels, row_titles=(NASTY,), legend=(("leg", (1, 2, 3)),)),
            Table(title="t", columns=tuple(f"a column {n}" for n in range(12)), rows=((NASTY, *[LONG] * 11),)),
            Plate(title="plot", picture=rng.integers(0, 256, (300, 1600, 3), dtype=np.uint8), words="plot"),
            Details(title="recipes", entries=((LONG, f'{{"a": "{"x" * 400}"}}\n{NASTY}'),)),
        ),
        made={"about": "x" * 300},
    )


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_opens_offline_fits_the_screen_and_is_quiet(visit, tmp_path, size, dark):
    path = write_report(tmp_path / "report.html", everything())
    seen = visit(path.as_uri(), size=size, offline=True, dark=dark)
    seen.page.locator("summary").first.click()
    assert seen.page.locator("details pre").first.is_visible()
    assert seen.overflow_px() == 0
    assert seen.requests == [path.as_uri()]
    assert seen.complaints == []
    assert seen.page.locator("h1").inner_text() == NASTY
    widths = seen.page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert widths == [16] * 9 + [1600]
    background = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in background.removeprefix("rgb(").removesuffix(")").split(","))
    assert light < 100 if dark else light > 600


def test_wide_tables_scroll_by_themselves(visit, tmp_path):
    seen = visit(write_report(tmp_path / "report.html", everything()).as_uri(), size=PHONE)
    wide = seen.page.locator(".wide").first
    assert wide.evaluate("one => one.scrollWidth > one.clientWidth")
    wide.evaluate("one => one.scrollLeft = 200")
    assert wide.evaluate("one => one.scrollLeft") == 200


def test_a_report_of_a_store(visit, features, tmp_path):
    result = make_report(ReportConfig(store=str(features), out=tmp_path / "report.html"))
    seen = visit(result.path.as_uri(), size=PHONE, offline=True)
    assert seen.overflow_px() == 0
    assert seen.complaints == []
    assert seen.page.locator("section h2").first.inner_text() == "discs: 8 images, 2 runs"
    assert seen.page.locator("table.pictures img").count() == 8
    seen.page.screenshot(path=tmp_path / "phone.png", full_page=True)
    with Image.open(tmp_path / "phone.png") as image:
        assert image.width == PHONE[0]
        assert len(image.convert("RGB").getcolors(1 << 24)) > 200

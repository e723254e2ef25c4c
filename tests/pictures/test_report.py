"""The page, parsed."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featstore.errors import BadRequestError
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
    Section,
    Table,
    render_report,
    write_report,
)

VOID = {"meta", "img", "br", "wbr"}
PICTURES = tuple(np.random.default_rng(i).integers(0, 256, (5 + i, 7, 3), dtype=np.uint8) for i in range(3))


class Page(HTMLParser):
    """Checks that tags are balanced and collects what a test wants to know."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report(*sections: Section, **fields: str) -> Report:
    return Report(
        title=fields.get("title", "T"), lead=fields.get("lead", "L"), sections=sections, made={"command": "c"}
    )


def test_the_page_is_whole_and_holds_everything(tmp_path: Path) -> None:
    panels = (Panel(title="input", pictures=PICTURES[:2]), Panel(title="features", pictures=(PICTURES[2], None)))
    path = write_report(
        tmp_path / "out" / "report.html",
        Report(
            title="featstore demo",
            lead="What came out.",
            sections=(
                ScoreTable(title="Scores", metric="mIoU", scores=(Score(name="basic", mean=0.35, std=0.012),)),
                PanelTable(title="Pictures", panels=panels, row_titles=("k0", "k1"), legend=(("leg", (1, 2, 3)),)),
                Table(title="Runs", columns=("name", "bytes"), rows=(("basic", 1234567), ("prompt", None))),
            ),
            made={"command": "featstore demo", "torch": "2.15"},
        ),
    )
    page = Page(path.read_text(encoding="utf-8"))
    words = " ".join(page.text)
    expected = ("featstore demo", "What came out.", "mIoU, %", "35.0", "± 1.2", "leg", "1,234,567", "–", "2.15", "k1")
    for text in expected:
        assert text in words
    images = page.all("img")
    assert [image["alt"] for image in images] == ["input: k0", "features: k0", "input: k1"]
    for image, original in zip(images, (PICTURES[0], PICTURES[2], PICTURES[1]), strict=True):
        kind, data = str(image["src"]).split(",")
        assert kind == "data:image/png;base64"
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), original)


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path) -> None:
    nasty = "</style><script>alert('x')</script>\"'&<img src=http://evil.example/x.png>"
    text = render_report(
        Report(
            title=nasty,
            lead=nasty,
            sections=(
                ScoreTable(title=nasty, metric=nasty, scores=(Score(name=nasty, mean=0.5, note=nasty),), note=nasty),
                PanelTable(
                    title=nasty,
                    panels=(Panel(title=nasty, pictures=PICTURES[:1]),),
                    row_titles=(nasty,),
                    legend=((nasty, (1, 2, 3)),),
                ),
                Table(title=nasty, columns=(nasty,), rows=((nasty,),)),
                IntervalTable(
                    title=nasty, metric=nasty, intervals=(Interval(name=nasty, value=0.1, note=nasty),), note=nasty
                ),
                Plate(title=nasty, picture=PICTURES[0], words=nasty, note=nasty),
                Details(title=nasty, entries=((nasty, nasty),), note=nasty),
            ),
            made={nasty: nasty},
        )
    )
    page = Page(text)
    assert page.all("script") == []
    assert page.all("link") == []
    assert [str(image["src"])[:22] for image in page.all("img")] == ["data:image/png;base64,"] * 2
    assert "".join(page.text).count(nasty) >= 23, "it is shown as text"
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert re.findall(r"(?:src|href)=\"(?!data:)", text) == []
    assert "url(" not in text
    assert "@import" not in text


def test_it_suits_phones_and_the_dark() -> None:
    text = render_report(report())
    metas = {meta.get("name"): meta["content"] for meta in Page(text).all("meta") if meta.get("name")}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["color-scheme"] == "light dark"
    assert "prefers-color-scheme:dark" in text
    assert "overflow-x:auto" in text


def test_bars_are_as_long_as_their_scores() -> None:
    scores = (
        Score(name="half", mean=0.2),
        Score(name="all", mean=0.4, std=0.1, highlight=True),
        Score(name="nan", mean=math.nan),
    )
    page = Page(render_report(report(ScoreTable(title="s", metric="m", scores=scores))))
    styles = [str(span.get("style", "")) for span in page.all("span") if span.get("class") == "fill"]
    widths = [float(re.sub(r"[^\d.]", "", style)) for style in styles]
    assert len(widths) == 2
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.02)
    assert widths[1] < 100
    (whisker,) = [str(span["style"]) for span in page.all("span") if span.get("class") == "whisker"]
    left, width = (float(number) for number in re.findall(r"[\d.]+", whisker))
    assert left + width / 2 == pytest.approx(widths[1], abs=0.02)
    assert [row.get("class") for row in page.all("tr")].count("best") == 1
    assert "–" in " ".join(page.text)
    assert "nan" not in " ".join(page.text).replace("nan", "", 1)


@pytest.mark.parametrize("scores", [(), (Score(name="a", mean=0.0),), (Score(name="a", mean=1.0, std=0.5),)])
def test_scores_at_the_ends(scores: tuple[Score, ...]) -> None:
    page = Page(render_report(report(ScoreTable(title="s", metric="m", scores=scores))))
    for span in page.all("span"):
        for number in re.findall(r"[\d.]+", str(span.get("style", ""))):
            assert 0 <= float(number) <= 100


def test_names_that_are_not_utf8_are_shown_nearly(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", report(title="a\udcffb"))
    assert "<h1>a?b</h1>" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(BadRequestError, match="2 columns, a row 1"):
        Table(title="t", columns=("a", "b"), rows=(("x",),))
    uneven = (Panel(title="a", pictures=PICTURES[:1]), Panel(title="b", pictures=PICTURES[:2]))
    with pytest.raises(BadRequestError, match="one picture a row"):
        render_report(report(PanelTable(title="p", panels=uneven)))
    grey = Panel(title="a", pictures=(PICTURES[0][:, :, 0],))
    with pytest.raises(BadRequestError, match=r"uint8 \(H, W, 3\)"):
        render_report(report(PanelTable(title="p", panels=(grey,))))


def places(page: Page, kind: str) -> list[list[float]]:
    """Numbers in the styles of the spans of a class."""
    spans = [span for span in page.all("span") if span.get("class") == kind]
    return [[float(number) for number in re.findall(r"-?[\d.]+", str(span["style"]))] for span in spans]


def test_intervals_lie_on_one_axis_with_zero_on_it() -> None:
    intervals = (
        Interval(name="helps", value=0.3, low=0.2, high=0.5),
        Interval(name="harms", value=-0.1, low=-0.3, high=0.0),
        Interval(name="nothing known", value=math.nan),
        Interval(name="no interval", value=0.1),
    )
    page = Page(render_report(report(IntervalTable(title="s", metric="gain", intervals=intervals))))
    zeros, dots, lines = (places(page, kind) for kind in ("zero", "dot", "line"))
    ((zero,),) = {tuple(place) for place in zeros}
    assert len(zeros) == 4
    (helps,), (harms,), (alone,) = dots
    scale = (helps - harms) / 0.4
    assert alone == pytest.approx(zero + 0.1 * scale, abs=0.05)
    assert harms < zero < helps
    assert lines[0] == pytest.approx([zero + 0.2 * scale, 0.3 * scale], abs=0.05)
    assert lines[1] == pytest.approx([zero - 0.3 * scale, 0.3 * scale], abs=0.05)
    assert all(0 <= value <= 100 for place in dots + lines + zeros for value in place)
    words = " ".join(page.text)
    assert "-0.300 to 0.000" in words
    assert "–" in words


@pytest.mark.parametrize("intervals", [(), (Interval(name="a", value=0.0),), (Interval(name="a", value=math.inf),)])
def test_intervals_at_the_ends(intervals: tuple[Interval, ...]) -> None:
    page = Page(render_report(report(IntervalTable(title="s", metric="m", intervals=intervals))))
    assert all(0 <= value <= 100 for kind in ("zero", "dot") for place in places(page, kind) for value in place)


def test_long_texts_are_folded_away() -> None:
    page = Page(render_report(report(Details(title="s", entries=(("recipe", '{\n  "t": 50\n}'),)))))
    assert [len(page.all(tag)) for tag in ("details", "summary", "pre")] == [1, 1, 1]
    assert "open" not in page.all("details")[0]
    assert '{\n  "t": 50\n}' in page.text

"""Every benchmark runs in small and gives figures; how fast this machine is, is for `featstore bench` to say."""

from __future__ import annotations

import functools
import json
import math

import pytest
from typer.testing import CliRunner

from featstore.cli.app import app
from featstore.errors import BadRequestError
from featstore.pipelines.bench import BenchConfig, bench
from featstore.pipelines.bench.timing import in_turn

pytestmark = pytest.mark.usefixtures("tiny")


def check(figures, names):
    assert set(names) <= set(figures)
    for name, value in figures.items():
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, str):
                assert math.isfinite(one), name
                assert one > 0, name


def test_extract_beside_bare_passes(tmp_path):
    figures = bench(("extract",), BenchConfig(images=5, repeats=2, device="cpu", beside=tmp_path / "s.zarr"))["extract"]
    check(
        figures,
        ["passes", "ratio", "ratios", "times_the_common_way", "finished_extract_seconds", "finished_extract_ratio"],
    )
    assert figures["passes"] == 20
    assert len(figures["ratios"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_store_beside_loose_files(tmp_path):
    figures = bench(("store",), BenchConfig(images=4, repeats=1, beside=tmp_path / "s.zarr"))["store"]
    check(figures, ["megabytes", "write_ratio", "read_ratio"])
    assert figures["megabytes"] == pytest.approx(4 * 320 * 64 * 64 * 2 / 1e6)


def test_head_in_a_process_of_its_own(tmp_path, monkeypatch):
    config = BenchConfig(images=33, repeats=1, max_steps=3, device="cpu", beside=tmp_path / "s.zarr")
    figures = bench(("head",), config)["head"]
    check(figures, ["seconds", "peak_rss_megabytes", "upsampled_float32_megabytes", "rss_ratio", "miou"])
    shapes = 24 + 16 + 16 + 8 + 2 * 77  # channels of the tiny model's legacy preset
    assert figures["upsampled_float32_megabytes"] == pytest.approx(4 * shapes * 64 * 64 * 4 * 33 / 1e6)


def test_the_sides_take_turns_in_going_first():
    calls = []
    for repeat in range(3):
        in_turn(repeat, *(functools.partial(calls.append, side) for side in "abc"))
    assert "".join(calls) == "abcbcacab"


def test_the_command_prints_a_table_and_json(tmp_path):
    words = ["bench", "store", "--images", "2", "--repeats", "1", "--store", str(tmp_path / "s.zarr")]
    table = CliRunner().invoke(app, words).stdout
    assert "write ratio" in table
    value = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert set(value) == {"store"}


def test_bad_requests(tmp_path):
    with pytest.raises(BadRequestError, match="'hed'"):
        bench(("store", "hed"), BenchConfig())
    with pytest.raises(BadRequestError, match="nowhere"):
        bench(("store",), BenchConfig(beside=tmp_path / "nowhere" / "s.zarr"))

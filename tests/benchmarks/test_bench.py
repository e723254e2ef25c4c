"""Every benchmark runs in small and gives figures; how fast this machine is, is for `featstore bench` to say."""

from __future__ import annotations

import functools
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

from featstore.cli.app import app
from featstore.errors import BadRequestError
from featstore.heads.pixels import PixelHeadConfig, PixelMembers, member_generator
from featstore.pipelines.bench import BenchConfig, bench, engines, head_common_way, tables
from featstore.pipelines.bench.engines import ENGINES
from featstore.pipelines.bench.storage import OPERATIONS
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


def test_store_beside_other_engines(tmp_path):
    figures = bench(("store",), BenchConfig(images=4, repeats=2, beside=tmp_path / "s.zarr"))["store"]
    shapes, missing = figures.pop("shapes"), figures.pop("missing")
    check(figures, ["megabytes", "write_ratio", "read_ratio"])
    assert missing == {}
    assert figures["megabytes"] == pytest.approx(4 * (1280 * 16**2 + 640 * 32**2 + 320 * 64**2) * 2 / 1e6)
    assert [list(maps) for maps in shapes["sd15"]["layers"].values()] == [[1280, 16, 16], [640, 32, 32], [320, 64, 64]]
    assert len(shapes["reference"]["layers"]) == 6
    for shape in shapes.values():
        check({name: shape[name] for name in ("megabytes", "images", "dask_cost", "dask_compute_cost")}, ["dask_cost"])
        assert set(shape["engines"]) == set(ENGINES) - {engines.REFERENCE}
        check(shape["npy"], OPERATIONS)
        for name, found in shape["engines"].items():
            measured = set(found) - {"checksum"}
            kind = engines.load()[0][name]
            assert measured == set(OPERATIONS) - (set() if kind.can_sync else {"write_fsync"})
            for operation in measured:
                check(found[operation], ["ratio", "ratios", "megabytes_per_second", "npy_megabytes_per_second"])
                assert len(found[operation]["ratios"]) == 2
    assert list(tmp_path.iterdir()) == []


LAYERS = {
    layer: np.random.default_rng(0).standard_normal((7, *shape)).astype(np.float16)
    for layer, shape in {"a": (3, 4, 4), "b": (2, 8, 8)}.items()
}


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("sync", [False, True])
def test_engines_read_what_they_wrote(tmp_path, name, sync):
    """Otherwise their speed would say nothing."""
    engine = engines.load()[0][name](tmp_path, LAYERS, block=3, sync=sync)
    engine.write()
    for layer, maps in LAYERS.items():
        for row in (5, 0):
            np.testing.assert_array_equal(np.asarray(engine.single(layer, row)).reshape(maps.shape[1:]), maps[row])
        np.testing.assert_array_equal(np.stack(list(engine.batch(layer, [4, 1, 6]))), maps[[4, 1, 6]])
        blocks = [engine.read_block(layer, block) for block in range(engine.n_blocks)]
        np.testing.assert_array_equal(np.concatenate(blocks), maps)
        lazy = engine.lazy(layer)
        assert lazy.numblocks[0] == engine.n_blocks
        np.testing.assert_array_equal(lazy.compute(scheduler="synchronous"), maps)
    engine.scan()
    engine.close()


def test_an_engine_that_is_not_installed_is_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    words = ["bench", "store", "--images", "2", "--repeats", "1", "--store", str(tmp_path / "s.zarr")]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0
    (line, again) = (text for text in shown.stdout.splitlines() if text.startswith("tensorstore"))
    assert line.split() == again.split()
    assert "not installed" in line
    assert "pip install tensorstore" in line


def test_head_in_a_process_of_its_own(tmp_path, monkeypatch):
    config = BenchConfig(
        images=33, repeats=1, max_steps=3, device="cpu", beside=tmp_path / "s.zarr", members=2, splits=1, shrink=160
    )
    figures = bench(("head",), config)["head"]
    titles = [title for title, _, _ in tables("head", figures)]
    assert titles[:2] == ["1 image, 2 members of 3 steps", "30 images"]
    assert titles[2].startswith("mIoU on toyhorse, 2 members of 3 steps")
    small, large, pairs = (figures.pop(name) for name in ("small", "large", "pairs"))
    assert all(len(pairs[side]) == 1 and 0 < pairs[side][0] < 1 for side in ("common_way", "featstore"))
    for side in (small["common_way"], small["featstore"]):
        assert side["pixels_a_second"] > 0
        assert side["more_megabytes"] > 0
    vector = 4 * (8 + 8 + 4 + 2) + 2 * 77
    assert large["common_way_megabytes"] == pytest.approx(30 * 256 * 256 * vector * 4 / 1e6)
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
    for name in ENGINES:
        assert sum(line.startswith(name) for line in table.splitlines()) == 2
    value = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert set(value) == {"store"}


def test_bad_requests(tmp_path):
    with pytest.raises(BadRequestError, match="'hed'"):
        bench(("store", "hed"), BenchConfig())
    with pytest.raises(BadRequestError, match="nowhere"):
        bench(("store",), BenchConfig(beside=tmp_path / "nowhere" / "s.zarr"))


def test_the_common_way_of_training_is_the_same_model_on_the_same_vectors():
    rng = np.random.default_rng(0)
    layers = {"a": (3, 4, 4), "b": (2, 8, 8)}
    bucket = [{n: rng.standard_normal((2, *s)).astype(np.float16) for n, s in layers.items()} for _ in range(2)]
    beside = {"t": rng.standard_normal((2, 5, 4, 4)).astype(np.float16)}
    masks = rng.integers(0, 3, (2, 16, 16)).astype(np.uint8)
    masks[0, :4] = 255
    rows, labels = head_common_way._rows(bucket, beside, masks)
    assert rows.shape == (2 * 256 - 64, 2 * 5 + 5)
    pixel = np.argwhere(masks != 255)[100]
    want = [
        functional.interpolate(torch.from_numpy(m[pixel[:1]]).float(), (16, 16), mode="bilinear")[0, :, *pixel[1:]]
        for m in [*(m for run in bucket for m in run.values()), *beside.values()]
    ]
    torch.testing.assert_close(rows[100], torch.cat(want))
    assert labels[100] == masks[tuple(pixel)]
    ours = PixelHeadConfig(members=1, assigners=2)
    members = PixelMembers(ours, runs=2, channels=5, attention=5, classes=3, generators=[member_generator(0, 0)])
    theirs = head_common_way._Member(2, 5, 5, 2, 3)
    assert sum(p.numel() for p in members.parameters()) == sum(p.numel() for p in theirs.parameters())
    found = head_common_way.train(bucket, beside, masks, members=2, steps=9, classes=3)
    assert found.pixels == 2 * 9 * 64
    said = head_common_way.predict(found.members, bucket, beside, (16, 16))
    assert said.shape == (2, 16, 16)
    assert set(said.unique().tolist()) <= {0, 1, 2}

"""A store costs no more to open, find or commit to however much is in it: requests are counted, not timed."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest

import featstore.store
from featstore.pipelines.bench import BenchConfig, scale
from featstore.pipelines.bench.scale import bench_scale, tables
from featstore.pipelines.presence import Presence
from featstore.store.local import LocalObjects
from featstore.store.stored_samples import PART_ROWS

SMALL, LARGE = 640, 4 * PART_ROWS


@pytest.fixture(scope="module", params=[SMALL, LARGE])
def filled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale") / "s.zarr"
    _, runs = scale._fill(folder, scale.Many(request.param))
    return folder, request.param, runs[0].path, runs[0].recipe


@pytest.fixture
def requests(monkeypatch):
    """Counts every request to the store."""
    counts: collections.Counter = collections.Counter()
    for name in ("open", "exists", "size_bytes", "names", "put", "put_new", "delete"):
        genuine = getattr(LocalObjects, name)

        def counted(self, *arguments, _genuine=genuine, _name=name, **options):
            counts[_name] += 1
            return _genuine(self, *arguments, **options)

        monkeypatch.setattr(LocalObjects, name, counted)
    return counts


def test_opening_and_finding_ask_for_the_same_whatever_is_there(filled, requests):
    folder, _, path, recipe = filled
    dataset = featstore.store.open(folder).dataset("many")
    assert dataset.find(recipe).path == path
    assert sum(requests.values()) <= 6


def test_a_plan_asks_for_parts_of_the_table_and_one_snapshot(filled, requests):
    folder, size, _, recipe = filled
    dataset = featstore.store.open(folder).dataset("many")
    missing = Presence(scale.Many(size), range(size), dataset).missing(dataset.find(recipe), list(scale._LAYERS))
    assert not any(mask.any() for mask in missing.values())
    # Keys and digests in parts, two array documents a layer, one snapshot; no record of any block.
    assert sum(requests.values()) <= 8 + 2 * -(-size // PART_ROWS) + 2 * len(scale._LAYERS)


def test_resuming_looks_at_the_incomplete_blocks_alone(filled, requests):
    folder, size, path, recipe = filled
    store = featstore.store.create(folder)
    run = store.dataset("many").open_run(path)
    run.uncommit(run.block_rows(3), ["layer0"])
    store.finish([run])
    requests.clear()
    dataset = featstore.store.open(folder).dataset("many")
    missing = Presence(scale.Many(size), range(size), dataset).missing(dataset.find(recipe), list(scale._LAYERS))
    assert np.flatnonzero(missing["layer0"]).tolist() == list(run.block_rows(3))
    assert sum(requests.values()) <= 9 + 2 * -(-size // PART_ROWS) + 2 * len(scale._LAYERS)
    rows = list(run.block_rows(3))
    requests.clear()
    run.write_block(3, rows, {"layer0": np.zeros((len(rows), 1, 1, 1), dtype=np.float16)})
    assert sum(requests.values()) <= 8
    store.finish([run])


def test_the_benchmark_shows_a_row_a_size(tmp_path: Path):
    figures = bench_scale(BenchConfig(images=1_200), tmp_path)
    assert [row["images"] for row in figures["sizes"]] == [1_000, 1_200]
    ((_, columns, cells),) = tables(figures)
    assert columns[:3] == ("images", "blocks", "open")
    assert len(cells) == 2
    assert all(value > 0 for row in figures["sizes"] for value in row.values())

"""The scaling benchmark in small: real processes, real blocks, few of them."""

from __future__ import annotations

import pytest
from PIL import Image

from featstore.errors import FeatstoreError
from featstore.pipelines.bench import BenchConfig, bench, cluster, simulated, tables
from featstore.pipelines.bench.cluster_picture import save_scaling


@pytest.fixture(scope="module")
def figures():
    config = BenchConfig(images=64, repeats=1, workers=2, block_seconds=0.2, blocks=3)
    return bench(("cluster",), config)["cluster"]


def test_all_blocks_are_there_and_counted(figures):
    rows = figures["workers"]
    assert [row["workers"] for row in rows] == [1, 2]
    assert [row["blocks"] for row in rows] == [3, 6]
    assert rows[0]["efficiency"] == 1
    for row in rows:
        # No worker is faster than its sleep.
        assert 0 < row["of_ideal"] <= 1
        assert row["blocks_per_second"] == pytest.approx(row["of_ideal"] * row["workers"] / 0.2)
        assert row["scheduler_ms"] > 0
        assert row["store_ms"] > 0


def test_the_client_is_asked_how_large_it_is(figures):
    (row,) = figures["memory"]
    assert (row["images"], row["tasks"]) == (64, 1)
    assert row["plan_bytes_an_image"] > 0
    assert row["planned_mb"] > 0


def test_real_passes_on_one_and_two(figures):
    rows = figures["reference"]
    assert [row["workers"] for row in rows] == [1, 2]
    assert rows[0]["efficiency"] == 1
    assert all(row["passes_per_second"] > 0 for row in rows)


def test_it_is_told_as_tables_and_drawn(figures, tmp_path):
    found = tables("cluster", figures)
    assert [title for title, _, _ in found] == ["simulated workers", "memory of the client", "embedded model"]
    assert all(len(row) == len(names) for _, names, rows in found for row in rows)
    picture = save_scaling(tmp_path / "scaling.png", figures)
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 500


def test_blocks_that_are_missing_or_done_by_others_are_no_measurement(tmp_path):
    run = simulated.make_store(str(tmp_path / "s.zarr"), 2)
    simulation = simulated.Simulation(store=str(tmp_path / "s.zarr"), run=run.path, seconds=0.0)
    first, second = simulated.blocks(run, 0, 2)
    done = [simulated.compute(simulation, first)]
    with pytest.raises(FeatstoreError, match="1 of 2 simulated blocks"):
        cluster._expect(done, run, 2, 1, 1)
    done.append(simulated.compute(simulation, second))
    with pytest.raises(FeatstoreError, match="not 2 processes without torch"):
        cluster._expect(done, run, 2, 2, 2)


@pytest.mark.parametrize(("workers", "processes"), [(1, 1), (2, 2), (6, 6), (8, 8), (16, 8), (64, 8), (7, 7), (11, 1)])
def test_workers_are_spread_evenly(workers, processes):
    assert cluster._processes(workers) == processes

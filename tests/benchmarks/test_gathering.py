"""The gathering benchmark in small."""

from __future__ import annotations

import pytest

from featstore.pipelines.bench import BenchConfig, bench, tables


def test_all_sides_gather_the_same_vectors_and_are_told():
    figures = bench(("gather",), BenchConfig(images=6, repeats=1, shrink=160))["gather"]
    sides = figures["sides"]
    assert [row["side"] for row in sides] == ["this process", "1 worker", "2 workers"]
    assert sides[0]["of_this_process"] == 1
    for row in sides:
        assert row["images_per_second"] == pytest.approx(6 / row["seconds"])
    assert figures["vector_bytes"] == 6 * 256 * 4 * (8 + 4 + 2)
    ((_, names, rows),) = tables("gather", figures)
    assert all(len(row) == len(names) for row in rows)

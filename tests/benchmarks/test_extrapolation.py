"""Extrapolation against a case worked by hand, and docs/scale.md against the figures that were measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featstore.pipelines.bench import extrapolation
from featstore.pipelines.bench.extrapolation import Assumptions, Measured, block_images, extrapolate

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "benchmarks" / "cluster.json"


def test_a_block_of_half_precision_has_25_images_and_of_int8_51():
    # The largest layer is 320 * 64 * 64 = 1,310,720 values an image; 64 MiB are 67,108,864 bytes.
    assert block_images(2) == 25
    assert block_images(1) == 51


def test_a_thousand_images_by_hand():
    measured = Measured(scheduler_ms=2.0, client_ms=3.0, plan_bytes_an_image=500.0, client_mb=100.0)
    assumed = Assumptions(runs=3, pass_seconds=0.036, gpus=2, gpu_hour_dollars=4.0)
    found = extrapolate(1000, measured, assumed)
    assert found.passes == 3000
    assert found.gpu_hours == pytest.approx(0.03)  # 108 s
    assert found.days == pytest.approx(0.03 / 48)
    assert found.bytes == 3000 * 2_621_440 * 2
    assert found.tasks == 40
    assert found.objects == 2 * 40 * 3 * 4
    assert found.task_seconds == pytest.approx(2.7)
    assert found.scheduler_hours == pytest.approx(0.08 / 3600)
    assert found.scheduler_share == pytest.approx(0.08 / 54)  # 54 s on two GPUs
    assert found.most_gpus == 1350  # 2.7 s a task, 2 ms of the scheduler each
    assert found.client_hours == pytest.approx(0.12 / 3600)
    assert found.client_bytes == pytest.approx(100.5e6)
    assert found.gpu_dollars == pytest.approx(0.12)
    assert found.write_dollars == pytest.approx((960 + 360) / 1000 * 0.005)
    assert found.month_dollars == pytest.approx(0.01572864 * 23)


def test_what_was_measured_is_taken_from_the_largest():
    figures = {
        "workers": [{"workers": 1, "scheduler_ms": 9.0}, {"workers": 4, "scheduler_ms": 2.5}],
        "memory": [
            {"images": 10, "client_ms": 8.0, "plan_bytes_an_image": 9e6, "planned_mb": 190.0},
            {"images": 1000, "client_ms": 3.0, "plan_bytes_an_image": 2000.0, "planned_mb": 102.0},
        ],
    }
    assert Measured.of(figures) == Measured(
        scheduler_ms=2.5, client_ms=3.0, plan_bytes_an_image=2000.0, client_mb=100.0
    )


def test_the_document_says_what_the_figures_give():
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert extrapolation.main(str(FIGURES)) in text


def test_the_figures_are_of_the_whole_benchmark():
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))["cluster"]
    assert [row["workers"] for row in figures["workers"]] == [1, 2, 4, 8, 16, 32, 64]
    assert max(row["images"] for row in figures["memory"]) == 1_000_000
    assert [row["workers"] for row in figures["reference"]] == [1, 2]

from __future__ import annotations

import json
import sys

import pytest

from featstore.pipelines.reference import compare


@pytest.mark.usefixtures("tiny")
def test_two_heads_are_compared_split_by_split(tmp_path, monkeypatch):
    report = tmp_path / "heads.json"
    words = ["--store", str(tmp_path / "features.zarr"), "--report", str(report)]
    monkeypatch.setattr(sys, "argv", ["compare", *words, "--splits", "2", "--members", "1", "--max-steps", "3"])
    compare.main()
    found = json.loads(report.read_text())
    assert set(found["miou"]) == {"features", "latents + RGB"}
    ours, theirs = found["miou"]["features"], found["miou"]["latents + RGB"]
    assert found["points"] == pytest.approx([100 * (a - b) for a, b in zip(ours, theirs, strict=True)])
    assert found["mean_points"] == pytest.approx(sum(found["points"]) / 2)
    assert found["ratio"] == pytest.approx(sum(ours) / sum(theirs))
    assert len(found["by_class"]) == 21

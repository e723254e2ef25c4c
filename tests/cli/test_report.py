"""`featstore report`, `featstore browse` and the kinds of `featstore show` on the command line."""

from __future__ import annotations

import json

import pytest


def test_report_says_what_it_wrote(run, run_json, features, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run_json("report", "--store", features, "--images", 1)
    assert set(said) == {"report", "sections", "bytes"}
    assert said["report"] == "report.html"
    assert said["bytes"] == (tmp_path / "report.html").stat().st_size
    assert "wrote other.html" in run("report", "--store", features, "--out", "other.html").stdout


def test_a_report_on_a_gate_alone_needs_no_store(run, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gate = {"anchor": "basic@501", "techniques": [{"technique": "prompt", "score": 0.1, "score_ci95": [0, 0.2]}]}
    (tmp_path / "gate.json").write_text(json.dumps(gate))
    run("report", "--gate", "gate.json")
    assert "basic@501" in (tmp_path / "report.html").read_text()
    assert "features.zarr" in refused("report")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report", "--out", "r.pdf"], ["r.pdf", ".html"]),
        (["report", "--gate", "none.json"], ["none.json", "featstore gate"]),
        (["browse"], ["features.zarr"]),
        (["show", "--kind", "pcb"], ["'pcb'", "did you mean 'pca'"]),
        (["show", "--kind", "assigners"], ["--head DIR"]),
        (["show", "--kind", "assigners", "--head", "none"], ["none"]),
        (["show", "--techniques", "basic"], ["--dataset"]),
        (["show", "--dataset", "toyhorse"], ["--techniques"]),
        (["show", "--dataset", "toyhorse", "--techniques", "basic", "--out", "x.jpg"], ["x.jpg", ".svg"]),
    ],
)
def test_bad_requests(refused, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(*words)
    for part in said:
        assert part in message
    assert list(tmp_path.iterdir()) == []

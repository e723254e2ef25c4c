"""`featstore log`: a table of the last extractions, all of one of them, and what scripts read."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def store(run, photos, tmp_path):
    """Two extractions; an image of the second one is broken."""
    words = ("extract", "--dataset", f"folder:{photos}", "--techniques", "basic", "--store", tmp_path / "s.zarr")
    run(*words, "--limit", 2)
    (photos / "05.png").write_bytes(b"no picture")
    run(*words, code=1)
    return tmp_path / "s.zarr"


def test_the_last_extractions_newest_first(run, run_json, store):
    newest, first = run_json("log", "--store", store)["logs"]
    assert [(one["state"], one["computed"], one["cached"]) for one in (newest, first)] == [
        ("done", 7, 2),
        ("done", 2, 0),
    ]
    assert newest["failed"]["count"] == 1
    assert newest["command"].startswith("featstore extract --dataset folder:")
    assert [one["id"] for one in run_json("log", "--store", store, "--limit", 1)["logs"]] == [newest["id"]]
    lines = run("log", "--store", store).stdout.splitlines()
    assert newest["id"] in lines[2]
    assert lines[2].split()[1:] == [
        "done",
        newest["user"],
        "photos",
        "basic",
        "7",
        "2",
        "1",
        "1",
        *lines[2].split()[-2:],
    ]


def test_all_of_one(run, run_json, store):
    newest, _ = run_json("log", "--store", store)["logs"]
    one = run_json("log", newest["id"][-8:], "--store", store)
    assert [line["kind"] for line in one["lines"]] == ["start", "stage", "failed", "progress", "end"]
    shown = run("log", newest["id"], "--store", store).stdout
    assert "computed 7, cached 2" in shown
    assert "failed 05.png in photos/reference/basic" in shown
    assert "failed: run photos/reference/basic" in shown


def test_what_is_not_there(run, refused, features, store, tmp_path):
    assert "unknown log 'nothing'" in refused("log", "nothing", "--store", store)
    assert "there is no store" in refused("log", "--store", tmp_path / "none.zarr")

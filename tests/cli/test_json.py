"""What scripts rely on: the keys of --json, and one object on standard output."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("tiny")

LEGACY = {
    "up-level0-upsampler-out",
    "up-level1-upsampler-out",
    "up-level2-upsampler-out",
    "up-level3-repeat2-vit-out",
    "attn-up-cross-2",
    "attn-up-cross-4",
}


def test_extract(run_json, photos, tmp_path):
    words = ("extract", "--dataset", f"folder:{photos}", "--techniques", "basic,controlnet", "--limit", "3")
    words += ("--timesteps", "50,200", "--store", tmp_path / "s.zarr")
    plan = run_json(*words, "--dry-run")
    assert not (tmp_path / "s.zarr").exists()
    assert [run["compute"] for run in plan["runs"]] == [3, 3, 3, 3]
    first = run_json(*words)
    assert set(first) == {"dataset", "model", "runs", "seconds", "images_per_second", "peak_rss_bytes"}
    assert (first["dataset"], first["model"]) == ("photos", "reference")
    assert [(run["technique"], run["timestep"]) for run in first["runs"]] == [
        ("basic", 50),
        ("basic", 200),
        ("controlnet", 50),
        ("controlnet", 200),
    ]
    for run in first["runs"]:
        keys = {"technique", "timestep", "fingerprint", "images", "computed", "reused", "failed", "layers", "bytes"}
        assert set(run) == keys
        assert (run["images"], run["computed"], run["reused"], run["failed"]) == (3, 3, 0, [])
        assert len(run["fingerprint"]) == 64
        assert set(run["layers"]) == LEGACY
        assert all(len(shape) == 3 for shape in run["layers"].values())
    assert sum(run["bytes"] for run in first["runs"]) == plan["bytes"]
    again = run_json(*words)
    assert [(run["computed"], run["reused"]) for run in again["runs"]] == [(0, 3)] * 4


def test_info(run_json, features):
    value = run_json("info", "--store", features)
    assert set(value) == {"store", "datasets", "bytes"}
    (dataset,) = value["datasets"]
    assert set(dataset) == {"name", "images", "runs"}
    assert (dataset["name"], dataset["images"]) == ("discs", 8)
    for run in dataset["runs"]:
        assert set(run) >= {"model", "technique", "timestep", "fingerprint", "committed", "images", "layers"}
        assert (run["committed"], run["images"]) == (8, 8)
        for layer in run["layers"].values():
            assert set(layer) == {"shape", "dtype", "bytes"}
            assert len(layer["shape"]) == 3
    assert value["bytes"] == sum(one["bytes"] for run in dataset["runs"] for one in run["layers"].values())
    assert run_json("info", "discs", "--store", features) == value


def test_train_head(run_json, features, labelled, tmp_path):
    words = ("train-head", "--dataset", f"folder:{labelled}", "--techniques", "basic,prompt", "--store", features)
    words += ("--splits", "2", "--ensemble", "2", "--max-steps", "30", "--device", "cpu", "--out", tmp_path / "head")
    value = run_json(*words)
    expected = {"task", "dataset", "techniques", "metrics", "seconds", "peak_rss_bytes", "head"}
    assert set(value) >= expected
    assert (value["task"], value["dataset"], value["techniques"]) == ("segmentation", "discs", "basic,prompt")
    for metric in ("miou", "accuracy"):
        assert set(value["metrics"][metric]) == {"mean", "std", "splits"}
        splits = value["metrics"][metric]["splits"]
        assert len(splits) == 2
        assert all(0 <= score <= 1 for score in splits)
        assert value["metrics"][metric]["mean"] == pytest.approx(sum(splits) / 2)
    assert value["head"] == str(tmp_path / "head")
    assert (tmp_path / "head" / "head.json").is_file()


def test_verify(run_json, features, own_features):
    value = run_json("verify", "--store", features)
    assert set(value) >= {"checked_images", "checked_bytes", "corrupt", "incomplete", "nonfinite", "ok"}
    assert value["checked_images"] == 16
    assert value["checked_bytes"] > 0
    assert (value["corrupt"], value["incomplete"], value["nonfinite"], value["ok"]) == ([], [], [], True)

    (shard, *_) = sorted(own_features.glob("discs/reference/basic-*/t050/up-level1-upsampler-out/c.0.0.0.0"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    broken = run_json("verify", "--store", own_features, code=1)
    assert not broken["ok"]
    assert len(broken["corrupt"]) == 1
    assert "test/5.png" in broken["corrupt"][0]
    run_json("verify", "--store", own_features, "--repair", code=1)
    assert run_json("verify", "--store", own_features, code=1)["corrupt"] == []


def test_datasets_and_models(run_json, run, tmp_path):
    value = run_json("datasets", "--data-root", tmp_path)["datasets"]
    assert value["toyhorse"]["present"]
    assert value["horse21"]["where"] == str(tmp_path / "horse_21")
    assert not value["horse21"]["present"]
    assert "ddpm-segmentation" in value["horse21"]["how_to_get"]
    assert set(run_json("datasets", "horse21")["datasets"]) == {"horse21"}
    assert run_json("models")["models"]["reference"]["present"]
    detail = run_json("models", "reference", "--image-size", "96")
    assert detail["layers"]["up-level2-upsampler-out"] == [16, 24, 24]
    assert set(detail["presets"]["legacy"]) == LEGACY
    assert "up-level2-upsampler-out" in run("models", "reference", "--layers").stdout


def test_show(run_json, features, labelled, tmp_path):
    out = tmp_path / "x.png"
    words = ("show", "--dataset", f"folder:{labelled}", "--techniques", "basic", "--store", features, "--out", out)
    assert run_json(*words, "--count", "1") == {"picture": str(out)}
    assert out.read_bytes().startswith(b"\x89PNG")

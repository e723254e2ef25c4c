"""A local SDXL folder with a ControlNet beside it and a LoRA, through the command line."""

from __future__ import annotations

import numpy as np

import featstore
from tests.tiny_models import build_tiny_controlnet
from tests.tiny_sdxl import build_tiny_sdxl, build_tiny_sdxl_lora


def test_prompt_and_a_combined_pass_at_two_timesteps(run_json, photos, tmp_path):
    folder = build_tiny_sdxl(tmp_path / "models" / "pipeline")
    build_tiny_controlnet(tmp_path / "models" / "controlnet-canny", folder)
    build_tiny_sdxl_lora(tmp_path / "lora", folder)
    words = ["extract", "--dataset", f"folder:{photos}", "--model", folder, "--prompt", "a fine horse"]
    words += ["--techniques", f"prompt,controlnet:canny+lora:{tmp_path}/lora", "--timesteps", "51,201"]
    words += ["--store", tmp_path / "s.zarr", "--device", "cpu"]
    report = run_json(*words)
    assert [(run["technique"].partition(":")[0], run["timestep"]) for run in report["runs"]] == [
        ("prompt", 51),
        ("prompt", 201),
        ("controlnet", 51),
        ("controlnet", 201),
    ]
    assert all(run["computed"] == run["images"] and not run["failed"] for run in report["runs"])
    assert [run["computed"] for run in run_json(*words)["runs"]] == [0] * 4
    stored = featstore.open(tmp_path / "s.zarr").dataset(report["dataset"])
    first, second = (stored.run(run["technique"], timestep=51) for run in (report["runs"][0], report["runs"][2]))
    layer = next(iter(report["runs"][0]["layers"]))
    assert first[layer].shape[1:] == tuple(report["runs"][0]["layers"][layer])
    assert not np.array_equal(first[layer].compute(), second[layer].compute())
    assert run_json("verify", "--store", tmp_path / "s.zarr")["ok"]

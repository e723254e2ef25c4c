"""Head training: seconds and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featstore.pipelines.bench.config import BenchConfig
from featstore.pipelines.bench.timing import command
from featstore.pipelines.extract import execute
from featstore.pipelines.plan import ExtractConfig, make_plan
from featstore.pipelines.progress import Silent


def bench_head(config: BenchConfig, folder: Path) -> dict[str, Any]:
    """Head training on all four techniques in a process of its own, and its largest resident set.

    Beside it stands what the usual way would hold: all maps of all images upsampled to the label
    grid in float32 (computed from the shapes, not run).
    """
    techniques = "basic,prompt,controlnet,lora"
    extraction = ExtractConfig(
        dataset="toyhorse",
        techniques=techniques,
        store=str(folder / "features.zarr"),
        limit=config.images,
        device=config.device,
        seed=config.seed,
    )
    plan = make_plan(extraction)
    execute(plan, Silent())
    words = ["--dataset", "toyhorse", "--techniques", techniques, "--store", extraction.store, "--splits", "1"]
    words += ["--out", str(folder / "head"), "--seed", str(config.seed)]
    words += ["--skip-missing"] if config.images is not None else []
    words += ["--device", config.device] if config.device is not None else []
    words += ["--max-steps", str(config.max_steps)] if config.max_steps is not None else []
    result = command("train-head", *words)
    channels = sum(shape[0] for shape in plan.runs[0].layers.values()) * len(plan.runs)
    side = plan.runs[0].recipe.height_px
    upsampled = channels * side * side * 4 * len(plan.wanted)
    return {
        "seconds": result["seconds"],
        "peak_rss_megabytes": result["peak_rss_bytes"] / 1e6,
        "upsampled_float32_megabytes": upsampled / 1e6,
        "rss_ratio": upsampled / result["peak_rss_bytes"],
        "miou": result["metrics"]["miou"]["mean"],
    }

"""Head training: seconds and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from featstore.pipelines.bench import head_pairs, head_sizes
from featstore.pipelines.bench.config import BenchConfig
from featstore.pipelines.bench.scale import Table
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
    pairs = head_pairs.compare(
        extraction.store,
        techniques=techniques,
        splits=config.splits,
        members=config.members or head_pairs.MEMBERS,
        steps=config.max_steps or head_pairs.STEPS,
        seed=config.seed,
    )
    channels = sum(shape[0] for shape in plan.runs[0].layers.values()) * len(plan.runs)
    side = plan.runs[0].recipe.height_px
    upsampled = channels * side * side * 4 * len(plan.wanted)
    return {
        **_sizes(config),
        "pairs": pairs,
        "seconds": result["seconds"],
        "peak_rss_megabytes": result["peak_rss_bytes"] / 1e6,
        "upsampled_float32_megabytes": upsampled / 1e6,
        "rss_ratio": upsampled / result["peak_rss_bytes"],
        "miou": result["metrics"]["miou"]["mean"],
    }


def _sizes(config: BenchConfig) -> dict[str, Any]:
    """What `head_sizes.measure` finds, as much of it as ``config`` asks for."""
    return head_sizes.measure(
        images=head_sizes.IMAGES if config.images is None else min(config.images, head_sizes.IMAGES),
        steps=config.max_steps or head_sizes.STEPS,
        members=config.members or head_sizes.MEMBERS,
        shrink=config.shrink,
        seed=config.seed,
    )


def tables(figures: Mapping[str, Any]) -> Iterator[Table]:
    """Speed and memory on random features of the size of Stable Diffusion 1.5's."""
    small, large = figures["small"], figures["large"]
    columns = ("", "seconds before", "seconds of training", "pixels a second", "steady", "memory added, MB")
    rows = [
        (
            title,
            *(f"{one[name]:.3g}" for name in ("prepare_seconds", "train_seconds")),
            *(f"{one[name]:,.0f}" for name in ("pixels_a_second", "steady_pixels_a_second", "more_megabytes")),
        )
        for title, one in (("common way", small["common_way"]), ("featstore", small["featstore"]))
    ]
    ratios = (small["times_the_pixels_a_second"], small["times_the_steady_rate"], small["memory_ratio"])
    rows.append(("ratio", "", "", f"{ratios[0]:.2f}", f"{ratios[1]:.2f}", f"1 / {ratios[2]:.1f}"))
    title = f"{small['images']} image, {small['members']} members of {small['steps']} steps"
    yield title, columns, rows
    yield (
        f"{large['images']} images",
        ("peak, MB", "common way holds, MB", "seconds of training", "seconds an epoch"),
        [
            (
                f"{large['peak_megabytes']:,.0f}",
                f"{large['common_way_megabytes']:,.0f} (computed)",
                f"{large['train_seconds']:.3g}",
                f"{large['seconds_an_epoch']:,.0f} (extrapolated)",
            )
        ],
    )
    pairs = figures["pairs"]
    yield (
        f"mIoU on toyhorse, {pairs['members']} members of {pairs['steps']} steps, the same splits",
        ("split", "common way %", "featstore %", "difference, points"),
        [
            (str(number), f"{100 * theirs:.2f}", f"{100 * ours:.2f}", f"{100 * (ours - theirs):+.2f}")
            for number, (theirs, ours) in enumerate(zip(pairs["common_way"], pairs["featstore"], strict=True), 1)
        ],
    )

"""The demo: the main job on the embedded data set and model, ending with scores and a picture."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featstore import pictures
from featstore.pipelines.extract import ExtractReport, execute
from featstore.pipelines.memory import peak_rss_bytes
from featstore.pipelines.plan import ExtractConfig, make_plan
from featstore.pipelines.progress import Progress, Silent
from featstore.pipelines.reading import BucketConfig, OpenBucket, extract_command, open_bucket
from featstore.pipelines.show_panels import attention_panels, pca_of_runs
from featstore.pipelines.train_head import TrainHeadConfig, TrainHeadReport, train_head

DATASET = "toyhorse"
TECHNIQUES = ("basic", "prompt", "controlnet", "lora")
PICTURED = 4
DEFAULT_MAX_STEPS = 8000
_VERSIONS = ("featstore", "torch", "diffusers", "zarr", "dask")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """How long the demo takes and where it writes."""

    out: Path = Path("demo")
    """Folder of the store, the heads, the picture and the report."""
    splits: int = 2
    """Splits that each head is trained and scored on."""
    ensemble: int = 3
    """Members of each head."""
    max_steps: int = DEFAULT_MAX_STEPS
    """Training steps at most, which keeps the demo short; `train_head` trains until the loss stops improving."""
    store: str | None = None
    """URL of the store; None: ``features.zarr`` in ``out``."""
    device: str | None = None
    """Device; None: a GPU where there is one."""
    seed: int = 0
    """Seed of the heads."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What the demo made."""

    scores: tuple[pictures.Score, ...]
    """mIoU of each head, 0..1; the amalgamated one is highlighted."""
    store: str
    picture: Path
    report: Path
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON."""
        return {
            "dataset": DATASET,
            "scores": [{"features": s.name, "miou": s.mean, "std": s.std} for s in self.scores],
            "store": self.store,
            "picture": str(self.picture),
            "report": str(self.report),
            "seconds": self.seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }


def demo(config: DemoConfig, progress: Progress | None = None) -> DemoResult:
    """Extract toyhorse with four techniques, train a head on each and one on all, draw and report."""
    start = time.perf_counter()
    progress = progress or Silent()
    config.out.mkdir(parents=True, exist_ok=True)
    store = config.store or str(config.out / "features.zarr")
    every = ",".join(TECHNIQUES)
    plan = make_plan(ExtractConfig(dataset=DATASET, techniques=every, store=store, device=config.device))
    progress.note(f"extracting {DATASET} with {every}: {plan.passes_todo} passes, {plan.bytes_todo / 1e6:.0f} MB")
    extracted = execute(plan, progress)
    progress.note(
        f"training {len(TECHNIQUES) + 1} heads of {config.ensemble} members on {config.splits} splits, "
        f"{config.max_steps} steps at most; `featstore train-head` has no such limit"
    )
    reports: dict[str, TrainHeadReport] = {}
    for techniques in (*TECHNIQUES, every):
        progress.note(f"training a head on {techniques}")
        reports[techniques] = train_head(_head_config(config, store, techniques), progress)
    scores = _scores(reports, every)
    bucket = open_bucket(_bucket(store, every))
    panels, legend, keys = _panels(bucket, reports, every)
    picture = pictures.save_grid(
        config.out / "picture.png",
        panels,
        row_titles=keys,
        title="toyhorse: PCA of features, and what heads see",
        legend=legend,
    )
    seconds = time.perf_counter() - start
    document = _report(config, scores, reports, every, panels, keys, legend, extracted, seconds)
    report = pictures.write_report(config.out / "report.html", document)
    return DemoResult(scores=scores, store=store, picture=picture, report=report, seconds=seconds)


def _bucket(store: str, techniques: str) -> BucketConfig:
    return BucketConfig(dataset=DATASET, techniques=techniques, store=store)


def _head_config(config: DemoConfig, store: str, techniques: str) -> TrainHeadConfig:
    return TrainHeadConfig(
        bucket=_bucket(store, techniques),
        ensemble=config.ensemble,
        splits=config.splits,
        max_steps=config.max_steps,
        device=config.device,
        out=config.out / "heads" / techniques.replace(",", "-"),
        seed=config.seed,
    )


def _scores(reports: dict[str, TrainHeadReport], every: str) -> tuple[pictures.Score, ...]:
    return tuple(
        pictures.Score(
            name=techniques,
            mean=report.metrics["miou"].mean,
            std=report.metrics["miou"].std,
            note="amalgamated" if techniques == every else "",
            highlight=techniques == every,
        )
        for techniques, report in reports.items()
    )


def _panels(
    bucket: OpenBucket, reports: dict[str, TrainHeadReport], every: str
) -> tuple[list[pictures.Panel], Sequence[tuple[str, tuple[int, int, int]]], list[str]]:
    """Columns of the picture for the first test images of the first split."""
    amalgamated = reports[every].results[0]
    rows = amalgamated.test_rows[:PICTURED]
    keys = [bucket.stored.samples.keys[row] for row in rows]
    images = [bucket.dataset.image(key) for key in keys]
    truth = [bucket.dataset.mask(key) for key in keys]
    predictions = {
        "basic alone": list(reports["basic"].results[0].predictions[:PICTURED]),
        "amalgamated": list(amalgamated.predictions[:PICTURED]),
    }
    panels = pictures.segmentation_panels(images, truth, features=pca_of_runs(bucket, rows), predictions=predictions)
    panels += attention_panels(bucket, rows, images)
    shown = [mask for mask in truth if mask is not None] + [m for maps in predictions.values() for m in maps]
    return panels, pictures.legend(bucket.dataset.info.classes, shown), keys


def _how_trained(config: DemoConfig) -> str:
    return (
        f"mIoU on test images, mean and deviation over {config.splits} splits. Heads of {config.ensemble} members, "
        f"trained for {config.max_steps} steps at most."
    )


def _report(
    config: DemoConfig,
    scores: Sequence[pictures.Score],
    reports: dict[str, TrainHeadReport],
    every: str,
    panels: Sequence[pictures.Panel],
    keys: Sequence[str],
    legend: Sequence[tuple[str, tuple[int, int, int]]],
    extracted: ExtractReport,
    seconds: float,
) -> pictures.Report:
    singles = [score for score in scores if not score.highlight]
    best = max(singles, key=lambda score: score.mean)
    amalgamated = next(score for score in scores if score.highlight)
    classes = zip(
        reports["basic"].results[0].metrics["per_class"], reports[every].results[0].metrics["per_class"], strict=True
    )
    weights = reports[every].results[0].weights
    sections: list[Any] = [
        pictures.ScoreTable(
            title="Scores",
            metric="mIoU",
            note=_how_trained(config),
            scores=tuple(scores),
        ),
        pictures.PanelTable(title="Pictures", panels=tuple(panels), row_titles=tuple(keys), legend=tuple(legend)),
        pictures.Table(
            title="By class, first split",
            columns=("class", "basic", "amalgamated"),
            rows=tuple((one["class"], one["iou"], two["iou"]) for one, two in classes),
        ),
        pictures.Table(
            title="Runs in the store",
            columns=("technique", "t", "images", "fingerprint", "MB"),
            rows=tuple(
                (
                    run["technique"],
                    run["timestep"],
                    run["computed"] + run["reused"],
                    run["fingerprint"][:8],
                    f"{run['bytes'] / 1e6:.1f}",
                )
                for run in extracted.to_json()["runs"]
            ),
        ),
    ]
    if weights is not None:
        share = np.asarray(weights).mean(axis=(0, 1))
        rows = tuple((name, f"{value:.3f}") for name, value in zip(TECHNIQUES, share, strict=True))
        sections.insert(
            3, pictures.Table(title="What the assigners chose", columns=("technique", "mean weight"), rows=rows)
        )
    return pictures.Report(
        title="featstore demo: toyhorse",
        lead=(
            f"The amalgamated head scores {100 * amalgamated.mean:.1f} % mIoU on test images, "
            f"the best single technique ({best.name}) {100 * best.mean:.1f} %."
        ),
        sections=tuple(sections),
        made={
            "commands": f"{extract_command(_bucket(extracted.plan.config.store, every))}, then featstore train-head",
            "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {extracted.plan.device}",
            "seconds": f"{seconds:.0f}",
        },
    )

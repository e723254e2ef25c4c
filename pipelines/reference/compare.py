"""Whether the model sees: a head on its features against the same head on VAE latents and RGB.

Run as ``python -m featstore.pipelines.reference.compare --store DIR --report FILE``. Both heads are the
product's own, trained on the same splits with the same seeds; the pairs are compared split by split.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np

from featstore import models
from featstore.datasets import Dataset
from featstore.extraction.images import prepare, to_pixels
from featstore.heads import (
    Beside,
    Features,
    PixelHeadConfig,
    RunRef,
    SegmentationResult,
    SegmentationTask,
    train_segmentation,
)
from featstore.heads.splits import splits as make_splits
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig
from featstore.pipelines.reading import BucketConfig, open_bucket

logger = logging.getLogger("featstore.compare")

ROWS_A_PASS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """What is compared."""

    store: Path
    """Store of the features; extracted if they are not there."""
    technique: str = "prompt"
    """Technique of the features."""
    timestep: int = 50
    """Timestep of the features."""
    splits: int = 5
    """Splits; the first is the data set's own."""
    members: int = 3
    """Ensemble members of every head."""
    max_steps: int | None = None
    """Training steps at most."""
    seed: int = 0
    """Seed of splits and heads."""


def latents_and_rgb(dataset: Dataset, size: int) -> dict[str, np.ndarray]:
    """What needs no denoiser: scaled latents (N, 4, size / 4, size / 4) and RGB in [-1, 1] (N, 3, size, size)."""
    import torch

    backbone = models.resolve("reference").load("cpu", "float32")
    images = np.stack([prepare(dataset.image(sample.key), size, size) for sample in dataset.samples])
    latents = []
    with torch.inference_mode():
        for start in range(0, len(images), ROWS_A_PASS):
            pixels = to_pixels(images[start : start + ROWS_A_PASS])
            latents.append(backbone.encode_images(pixels).numpy())
    backbone.close()
    rgb = to_pixels(images).numpy()
    return {"latents": np.concatenate(latents).astype(np.float32), "rgb": rgb.astype(np.float32)}


def compare(config: CompareConfig) -> dict[str, Any]:
    """Train both heads on every split and return the paired scores, plain JSON."""
    extract(
        ExtractConfig(
            dataset="toyhorse",
            techniques=config.technique,
            timesteps=(config.timestep,),
            store=str(config.store),
            device="cpu",
        )
    )
    bucket = open_bucket(
        BucketConfig(
            dataset="toyhorse",
            techniques=config.technique,
            timesteps=(config.timestep,),
            store=str(config.store),
        )
    )
    run, dataset = bucket.runs[0], bucket.dataset
    masks = np.stack([_mask(dataset, key) for key in bucket.stored.samples.keys])
    low = latents_and_rgb(dataset, run.recipe.height_px)
    sides: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
        "features": (
            {name: run[name] for name in bucket.maps},
            {name: run[name] for one in bucket.beside for name in one.layers},
        ),
        "latents + RGB": ({name: da.from_array(array, chunks=(64, -1, -1, -1)) for name, array in low.items()}, {}),
    }
    found: dict[str, list[SegmentationResult]] = {name: [] for name in sides}
    for number, (train, test) in enumerate(make_splits(config.splits, bucket.stored.samples.splits, seed=config.seed)):
        for name, (maps, attention) in sides.items():
            beside = [Beside(run=RunRef(name="attention"), layers=attention)] if attention else []
            task = SegmentationTask(
                features=Features(maps=[maps], beside=beside),
                masks=masks,
                train_rows=train.tolist(),
                test_rows=test.tolist(),
                classes=dataset.info.classes,
            )
            head = PixelHeadConfig(members=config.members, max_steps=config.max_steps)
            found[name].append(train_segmentation(task, head, seed=config.seed))
            logger.info("split %d, %s: mIoU %.4f", number, name, found[name][-1].metrics["miou"])
    return _summary(config, dataset.info.classes, found)


def _mask(dataset: Dataset, key: str) -> np.ndarray:
    mask = dataset.mask(key)
    assert mask is not None, "every image of toyhorse has labels"
    return mask


def _summary(
    config: CompareConfig, classes: Sequence[str], found: Mapping[str, Sequence[SegmentationResult]]
) -> dict[str, Any]:
    miou = {name: [result.metrics["miou"] for result in results] for name, results in found.items()}
    ours, theirs = miou["features"], miou["latents + RGB"]
    points = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    by_class = {
        name: {
            kind: statistics.fmean(result.metrics["per_class"][index]["iou"] or 0.0 for result in results)
            for kind, results in found.items()
        }
        for index, name in enumerate(classes)
    }
    return {
        "technique": config.technique,
        "timestep": config.timestep,
        "members": config.members,
        "miou": miou,
        "points": points,
        "mean_points": statistics.fmean(points),
        "ratio": statistics.fmean(ours) / statistics.fmean(theirs),
        "by_class": by_class,
    }


def main() -> None:
    """Parse, compare, write the report."""
    parser = argparse.ArgumentParser(prog="compare", description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="store of the features")
    parser.add_argument("--report", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--technique", default="prompt")
    parser.add_argument("--timestep", type=int, default=50)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--max-steps", type=int)
    given = vars(parser.parse_args())
    report = given.pop("report")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    result = compare(CompareConfig(**given))
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    logger.info("mIoU ratio %.2f, %.1f points", result["ratio"], result["mean_points"])


if __name__ == "__main__":
    main()

"""Heads of both ways on the same splits of toyhorse: whether speed and memory cost any score."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.heads.splits import splits as make_splits
from featstore.pipelines.reading import BucketConfig, OpenBucket, open_bucket

MEMBERS = 3
STEPS = 1500


def compare(store: str, *, techniques: str, splits: int, members: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Train and score both on each split.

    Args:
        store: URL of a store with toyhorse; images without features are left out.
        techniques: the bucket.
        splits: how many; the first is the set's own.
        members: of the ensembles.
        steps: of each member; both take exactly so many.
        seed: of splits and heads.

    Returns:
        ``common_way`` and ``featstore``: mIoU (0..1) of each split.
    """
    from featstore.heads import PixelHeadConfig, SegmentationTask, train_segmentation
    from featstore.metrics import SegmentationMeter
    from featstore.pipelines.bench import head_common_way

    bucket = open_bucket(BucketConfig(dataset="toyhorse", techniques=techniques, store=store))
    usable = bucket.complete()
    masks = _masks(bucket)
    size = (masks.shape[1], masks.shape[2])
    found: dict[str, list[float]] = {"common_way": [], "featstore": []}
    for train, test in make_splits(splits, bucket.stored.samples.splits, usable=usable.tolist(), seed=seed):
        task = SegmentationTask(
            features=bucket.features(usable),
            masks=masks,
            train_rows=train.tolist(),
            test_rows=test.tolist(),
            classes=bucket.classes,
        )
        config = PixelHeadConfig(members=members, assigners=2, max_steps=steps, patience_steps=steps)
        found["featstore"].append(train_segmentation(task, config, seed=seed).metrics["miou"])
        theirs = head_common_way.train(
            *_arrays(bucket, train),
            task.labels(train.tolist()),
            members=members,
            steps=steps,
            classes=len(bucket.classes),
        )
        meter = SegmentationMeter(bucket.classes)
        for row in test.tolist():
            said = head_common_way.predict(theirs.members, *_arrays(bucket, np.array([row])), size)
            meter.update(said.numpy().astype(np.uint8), task.labels([row]))
        found["common_way"].append(meter.compute().miou)
    return {"members": members, "steps": steps, **found}


def _masks(bucket: OpenBucket) -> npt.NDArray[np.uint8]:
    masks = [bucket.dataset.mask(key) for key in bucket.stored.samples.keys]
    assert all(mask is not None for mask in masks), "every image of toyhorse has labels"
    return np.stack([mask for mask in masks if mask is not None])


def _arrays(
    bucket: OpenBucket, rows: npt.NDArray[np.int64]
) -> tuple[list[dict[str, npt.NDArray[Any]]], dict[str, npt.NDArray[Any]]]:
    """Maps of ``rows``: of each run of the bucket by layer, and what stands beside them."""
    return (
        [{name: run.numpy(name, rows) for name in bucket.maps} for run in bucket.runs],
        {name: one.run.numpy(name, rows) for one in bucket.beside for name in one.layers},
    )

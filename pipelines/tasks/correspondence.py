"""Semantic correspondence, as train-head and evaluate run it: the same points in two images of one category."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from featstore.datasets import Dataset, Keypoints, UnreadableImageError
from featstore.datasets.files import FileDataset, FileItem
from featstore.datasets.pixels import image_size
from featstore.errors import BadRequestError, IncompatibleError
from featstore.heads.splits import Split
from featstore.pipelines.progress import Progress
from featstore.pipelines.reading import OpenBucket
from featstore.pipelines.tasks.base import HeadSettings, LabelledRows, PreparedTask, StepProgress

if TYPE_CHECKING:
    from featstore.heads import Head
    from featstore.heads.correspondence_task import CorrespondenceTask, ImagePoints
    from featstore.heads.correspondence_training import CorrespondenceResult

METRICS = ("pck_img", "pck_bbox", "pck_img_point", "pck_bbox_point", "pck_bbox_auc")
TRAIN_PAIRS, TEST_PAIRS = 5000, 2000
"""Pairs that are drawn at most where the data set has none of its own for these images."""


class Correspondence(PreparedTask):
    """Points of a data set's images, and its pairs.

    Pairs are the data set's own where all images are of one split of it. Elsewhere (it has none, or the
    split was drawn at random) they are all ordered pairs of images of one category that have a visible
    point in common, or a sample of `TRAIN_PAIRS` and `TEST_PAIRS` of them, which depends on the images only.
    """

    def __init__(self, bucket: OpenBucket, rows: LabelledRows, progress: Progress) -> None:
        keypoints = read_keypoints(bucket.dataset, progress)
        self.bucket = bucket
        self.usable = rows.usable(bucket, keypoints, progress)
        self.points: dict[int, ImagePoints] = {}
        files = {item.key: item.image for item in _files(bucket.dataset)}
        for row in np.flatnonzero(self.usable).tolist():
            key = bucket.stored.samples.keys[row]
            try:
                self.points[row] = image_points(keypoints[key], _size(bucket.dataset, key, files.get(key)))
            except UnreadableImageError as error:
                progress.note(f"left out: {error}")
                self.usable[row] = False
        if len(self.points) < 2:
            raise BadRequestError(
                f"{len(self.points)} images of {bucket.dataset.info.name!r} with points are usable; "
                "correspondence needs 2 or more"
            )

    def pairs(self, rows: np.ndarray, most: int) -> np.ndarray:
        """Pairs (n, 2) of rows, source and target, among ``rows``; ``most`` bounds those that are drawn.

        Args:
            rows: (m,) int64 rows of the store.
            most: pairs at most where the data set has none of its own for these rows.
        """
        own = self._own_pairs(rows)
        return draw_pairs(self.points, rows, most) if own is None else own

    def _own_pairs(self, rows: np.ndarray) -> np.ndarray | None:
        pairs, names = self.bucket.dataset.pairs, self.bucket.stored.samples.splits
        splits = {names[row] for row in rows}
        if pairs is None or len(splits) != 1:
            return None
        row_of, wanted = self.bucket.stored.row_of, set(rows.tolist())
        found = [
            (row_of[pair.source], row_of[pair.target])
            for pair in pairs
            if pair.split in splits and row_of.get(pair.source) in wanted and row_of.get(pair.target) in wanted
        ]
        return _with_common_points(self.points, np.array(found, np.int64).reshape(-1, 2))

    def task(self, train: np.ndarray, test: np.ndarray) -> CorrespondenceTask:
        """The problem of one split.

        Raises:
            BadRequestError: if rows are given among which there is no pair.
        """
        from featstore.heads.correspondence_task import CorrespondenceTask

        found = {}
        for what, rows, most in (("training", train, TRAIN_PAIRS), ("test", test, TEST_PAIRS)):
            found[what] = self.pairs(rows, most) if len(rows) else np.empty((0, 2), np.int64)
            if len(rows) and not len(found[what]):
                raise BadRequestError(
                    f"the {len(rows)} {what} images of {self.bucket.dataset.info.name!r} have no pair: no two are of "
                    "one category and show a point that is visible in both",
                    hint="correspondence needs 2 images of one category or more in each split",
                )
        return CorrespondenceTask(
            features=self.features(), points=self.points, train_pairs=found["training"], test_pairs=found["test"]
        )

    @override
    def train(self, split: Split, settings: HeadSettings, progress: Progress, title: str) -> CorrespondenceResult:
        from featstore.heads.correspondence_net import CorrespondenceConfig
        from featstore.heads.correspondence_training import train_correspondence

        config = CorrespondenceConfig(
            conv=settings.head == "conv",
            assigners=settings.assigners,
            per_channel=settings.per_channel,
            max_steps=settings.max_steps,
        )
        with StepProgress(progress, title) as advance:
            return train_correspondence(
                self.task(*split), config, seed=settings.seed, device=settings.device, progress=advance
            )

    @override
    def score(self, head: Head, rows: np.ndarray, progress: Progress) -> dict[str, Any]:
        from featstore.heads.correspondence import CorrespondenceHead
        from featstore.heads.correspondence_scoring import score_correspondence

        if not isinstance(head, CorrespondenceHead):
            raise IncompatibleError(
                f"a {head.kind!r} head finds no points and cannot be scored on correspondence",
                hint="name a head that was trained with --task correspondence",
            )
        return score_correspondence(self.task(rows[:0], rows), head)


def read_keypoints(dataset: Dataset, progress: Progress) -> dict[str, Keypoints]:
    """The points of every image that shows one, by key.

    Raises:
        BadRequestError: if there is no such image.
    """
    found = {}
    for sample in dataset.samples:
        try:
            points = dataset.keypoints(sample.key)
        except UnreadableImageError as error:
            progress.note(f"left out: the points of {sample.key!r} cannot be read: {error}")
            continue
        if points is not None and points.visible.any():
            found[sample.key] = points
    if not found:
        raise BadRequestError(
            f"data set {dataset.info.name!r} has no keypoints",
            hint="use a data set with points of its images, such as spair71k or toyhorse",
        )
    return found


def image_points(keypoints: Keypoints, size_px: tuple[int, int]) -> ImagePoints:
    """Points as shares of the image's width and height: resizing an image for a model leaves these as they are.

    Args:
        keypoints: of the image as `Dataset.image` gives it; visible ones beyond its border are set to the border.
        size_px: height and width of that image.
    """
    from featstore.heads.correspondence_task import ImagePoints

    sides = np.array(size_px[::-1], np.float32)
    return ImagePoints(
        names=keypoints.names,
        xy=(keypoints.xy_px / sides).clip(0, 1).astype(np.float32),
        visible=keypoints.visible,
        size_px=size_px,
        box_px=keypoints.box_px,
        category=keypoints.category,
    )


def draw_pairs(points: dict[int, ImagePoints], rows: np.ndarray, most: int) -> np.ndarray:
    """All ordered pairs (n, 2) of rows of one category with a visible point in common, or ``most`` drawn of them.

    Args:
        points: row to its points.
        rows: (m,) int64 rows.
        most: pairs at most. Fewer come out where some of those drawn have no point in common.
    """
    categories = defaultdict(list)
    for row in rows.tolist():
        categories[points[row].category].append(row)
    members = [np.array(categories[name], np.int64) for name in sorted(categories)]
    counts = np.array([len(m) * (len(m) - 1) for m in members], np.int64)
    ends = np.cumsum(counts)
    total = int(counts.sum())
    numbers = np.arange(total)
    if total > most:
        numbers = np.sort(np.random.default_rng(0).choice(total, most, replace=False, shuffle=False))
    category = np.searchsorted(ends, numbers, side="right")
    place = numbers - (ends - counts)[category]
    pairs = [_ordered_pair(members[c], p) for c, p in zip(category.tolist(), place.tolist(), strict=True)]
    return _with_common_points(points, np.array(pairs, np.int64).reshape(-1, 2))


def _ordered_pair(members: np.ndarray, number: int) -> tuple[int, int]:
    """The ordered pair of two different members with this number, 0 .. m * (m - 1) - 1."""
    source, target = divmod(number, len(members) - 1)
    return int(members[source]), int(members[target + (target >= source)])


def _with_common_points(points: dict[int, ImagePoints], pairs: np.ndarray) -> np.ndarray:
    from featstore.heads.correspondence_task import shared

    common = [len(shared(points[a], points[b])[0]) > 0 for a, b in pairs.tolist()]
    kept: np.ndarray = pairs[np.array(common, bool)]
    return kept


def _files(dataset: Dataset) -> tuple[FileItem, ...]:
    return dataset.items if isinstance(dataset, FileDataset) else ()


def _size(dataset: Dataset, key: str, file: Path | None) -> tuple[int, int]:
    """Height and width of an image as the data set gives it; of a file from its header, without decoding."""
    size = None if file is None else image_size(file)
    if size is None:
        height, width, _ = dataset.image(key).shape
        size = height, width
    return size

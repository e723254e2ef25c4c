"""A trained head used on images: what it needs is extracted first, as far as the store lacks it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featstore.datasets import DatasetInfo
from featstore.errors import BadRequestError, IncompatibleError, NotCommittedError
from featstore.pipelines.again import Need, check, extractions
from featstore.pipelines.device import resolve_device
from featstore.pipelines.extract import execute
from featstore.pipelines.head_use import OpenHead, open_head
from featstore.pipelines.plan import ExtractConfig, make_plan
from featstore.pipelines.progress import Progress, Silent
from featstore.recipe import Recipe


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PredictConfig:
    """Which head to use, on which images."""

    head: Path
    """Its folder."""
    images: tuple[Path, ...] = ()
    """A folder of images, or files of one folder; none: the test images of the head's own data set."""
    store: str = "features.zarr"
    """URL of the store in which features are looked for and kept."""
    out: Path = Path("predictions")
    """Folder of what is predicted."""
    model: str | None = None
    """Name or folder of the model, where it is another than the one that the head's recipes name."""
    data_root: Path | None = None
    """Where data sets lie."""
    extract: bool = True
    """Whether missing features are extracted; False: they are an error."""
    device: str | None = None
    """Device; None: a GPU where there is one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PredictReport:
    """What was predicted; `to_json` is what ``--json`` prints."""

    task: str
    out: Path
    images: int
    extracted: int
    """Forward passes that had to be run."""
    predictions: dict[str, Any]
    """Plain JSON by the task: what is said of each image, and the files written."""
    failed: dict[str, str]
    """Images without a prediction, with the reason."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        return {
            "task": self.task,
            "out": str(self.out),
            "images": self.images,
            "passes": self.extracted,
            "predictions": self.predictions,
            "failed": [{"key": key, "reason": reason} for key, reason in self.failed.items()],
        }


def predict(config: PredictConfig, progress: Progress | None = None) -> PredictReport:
    """Use a head on images.

    Raises:
        NotFoundError: if there is no head, or the model's weights are needed and not there.
        IncompatibleError: if features cannot be made as those that the head was trained on were.
        NotCommittedError: if features are missing and are not to be extracted.
    """
    progress = progress or Silent()
    opened = open_head(config.head)
    if opened.kind.predict is None:
        raise BadRequestError(f"a head for {opened.task} predicts nothing of single images")
    plans = []
    for extraction, recipes in _extractions(config, opened):
        plans.append(make_plan(extraction))
        check(plans[-1], recipes)
    plan = plans[0]
    failed: dict[str, str] = {}
    for one in plans:
        if one.passes_todo and not config.extract:
            todo = np.logical_or.reduce([run.todo for run in one.runs])
            keys = [one.dataset.samples[place].key for place, lacks in zip(one.wanted, todo, strict=True) if lacks]
            raise NotCommittedError(
                f"features of {len(keys)} of {len(one.wanted)} images are missing, e.g. of {keys[0]!r}",
                hint="leave out --no-extract, and they are made",
            )
        if one.passes_todo:
            failed |= execute(one, progress).failed
    asked = opened.bucket_config(
        store=config.store, dataset=plan.config.dataset, dataset_name=plan.dataset_name, data_root=config.data_root
    )
    bucket = opened.open_bucket(asked)
    wanted = [plan.dataset.samples[place].key for place in plan.wanted]
    there = [key for key in wanted if key not in failed]
    if not there:
        raise BadRequestError(f"none of the {len(wanted)} images can be used, e.g. {failed[wanted[0]]}")
    rows = bucket.require(there, asked)
    head = opened.load(resolve_device(config.device))
    predictions = opened.kind.predict(head, bucket, rows, config.out, progress)
    return PredictReport(
        task=opened.task,
        out=config.out,
        images=len(rows),
        extracted=sum(one.passes_todo for one in plans),
        predictions=predictions,
        failed=failed,
    )


def _extractions(config: PredictConfig, opened: OpenHead) -> list[tuple[ExtractConfig, list[Recipe]]]:
    """What makes features of the images as those that the head was trained on."""
    first = opened.recipes[0]
    if config.images and any(recipe.components for recipe in opened.recipes):
        raise IncompatibleError(
            f"the head reads channels reduced to {first.components} by a projection fitted on its own data set",
            hint="add the images to that data set, extract it again, and predict without --images",
        )
    dataset, keys = _images(config.images)
    base = ExtractConfig(
        dataset=dataset or opened.made["dataset"],
        dataset_name=None if dataset else opened.made["dataset_name"],
        techniques="",
        store=config.store,
        split=None if dataset else opened.made["test_split"],
        keys=keys,
        device=config.device,
        data_root=config.data_root,
        like=_info(opened.made["info"]) if dataset else None,
    )
    model = config.model or opened.made["model"]
    needs = [
        Need(recipe=recipe, model=model or recipe.model, layers=tuple(opened.features.layers))
        for recipe in opened.recipes
    ]
    for spec, asked, value in zip(
        opened.features.beside, opened.made["beside"], opened.made["beside_recipes"], strict=True
    ):
        recipe = Recipe.from_json(value)
        own = asked["model"] or (model if recipe.model == first.model else None)
        needs.append(Need(recipe=recipe, model=own or recipe.model, layers=tuple(spec.layers)))
    return extractions(needs, base)


def _info(value: dict[str, Any]) -> DatasetInfo:
    """A data set's facts from the JSON that a head keeps; what a later version added is left out."""
    known = {field.name for field in dataclasses.fields(DatasetInfo)}
    values: dict[str, Any] = {
        name: tuple(one) if isinstance(one, list) else one for name, one in value.items() if name in known
    }
    return DatasetInfo(**values)


def _images(paths: Sequence[Path]) -> tuple[str | None, tuple[str, ...] | None]:
    """The data set that ``paths`` stand for, and those of its images that are meant (None: all)."""
    if not paths:
        return None, None
    for path in paths:
        if not path.exists():
            raise BadRequestError(f"{path} does not exist", hint="name a folder of images, or image files")
    if len(paths) == 1 and paths[0].is_dir():
        return f"folder:{paths[0]}", None
    if folders := [path for path in paths if path.is_dir()]:
        raise BadRequestError(f"{folders[0]} is a folder among others", hint="name one folder, or files of one folder")
    root = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    return f"folder:{root}", tuple(path.absolute().relative_to(root).as_posix() for path in paths)

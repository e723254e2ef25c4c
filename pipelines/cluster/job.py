"""What is sent to workers: the job, a few kB and the same for all its blocks, and the blocks, images named one by one.

A worker never lists or hashes the whole data set: a block names its images, their digests, where they lie below the
data set's root where they are files, and their texts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featstore.datasets import DatasetInfo, UnreadableImageError
from featstore.datasets.files import FileDataset
from featstore.datasets.like import Like
from featstore.models import MODELS
from featstore.models.ddpm import PREFIX as _DDPM_PREFIX
from featstore.pipelines.compute import agreeing
from featstore.pipelines.outcome import RunOutcome
from featstore.pipelines.plan import ExtractConfig, Plan, PlannedRun
from featstore.recipe import Recipe
from featstore.store.urls import is_remote, local_path
from featstore.techniques import Part, Steering, Technique

_FILE_TEXTS = "captions file"
"""Kind of the texts that come from a file of captions."""
_CHECKED = (0, 0.5, 1)
"""Where in the data set images are that workers look for."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Some images of a data set, as many as a block has."""

    keys: tuple[str, ...]
    digests: tuple[str, ...]
    files: tuple[str, ...] | None
    """Where each lies below the data set's root; None: the data set finds them by their keys."""
    texts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Texts an image, by kind of caption."""

    def __len__(self) -> int:
        """How many."""
        return len(self.keys)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobRun:
    """One run of a job."""

    recipe: Recipe
    steering: Steering
    """As the client resolved it, without the texts of a captions file."""
    technique: Technique
    """The same with absolute paths, for workers to resolve."""
    layers: Mapping[str, tuple[int, int, int]]
    path: str | None
    """Of the run in the store; None: it is not created yet."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobGroup:
    """Runs that are walked through together; see `featstore.pipelines.compute.agreeing`."""

    runs: tuple[int, ...]
    batch_size: int
    threads: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One extraction, as workers need it."""

    id: str
    config: ExtractConfig
    """What was asked for; paths are absolute."""
    dataset_name: str
    info: DatasetInfo
    root: str | None
    """Folder of the data set's files on the client; None where it has no files that are images."""
    model: str
    weights_digest: str
    device: str
    compute_dtype: str
    runs: tuple[JobRun, ...]
    groups: tuple[JobGroup, ...]
    sample: Images
    """A few images that the client can read; workers look for them before their first block."""
    mark: str
    """Key of an object that the client has put into the store, for workers to find it there."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One task: a block of images and what runs of a group lack of it."""

    group: int
    block: int
    rows: np.ndarray
    """Row of each image in the store's table (n,), ascending."""
    images: Images
    missing: Mapping[int, Mapping[str, np.ndarray]]
    """By run of the job and layer, a mask (n,): True where the row is to be computed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Parcel:
    """A job as it travels: unpacked once a worker."""

    id: str
    packed: bytes

    @classmethod
    def of(cls, job: Job) -> Parcel:
        """Pack it."""
        return cls(job.id, zlib.compress(pickle.dumps(job)))

    def job(self) -> Job:
        """Unpack it."""
        job: Job = pickle.loads(zlib.decompress(self.packed))
        return job


def make_job(plan: Plan, outcomes: Sequence[RunOutcome], mark: str) -> Job:
    """The job of a plan.

    Args:
        plan: what to do.
        outcomes: its runs, in their order, as they are created; empty: they are not yet.
        mark: see `Job.mark`.
    """
    config = _absolute(plan.config)
    chosen: list[tuple[PlannedRun, str | None]] = [(one.planned, one.run.path) for one in outcomes]
    chosen = chosen or [(one, None) for one in plan.runs]
    runs = tuple(
        JobRun(
            recipe=planned.recipe,
            steering=_textless(planned.steering),
            technique=_with_paths(planned.steering.technique),
            layers=planned.layers,
            path=path,
        )
        for planned, path in chosen
    )
    places = {id(outcome): index for index, outcome in enumerate(outcomes)}
    groups = tuple(
        JobGroup(runs=tuple(places[id(one)] for one in group), batch_size=batch_size, threads=threads)
        for (_, batch_size, threads), group in agreeing(outcomes).items()
    )
    files = _files(plan)
    return Job(
        id=uuid.uuid4().hex[:12],
        config=config,
        dataset_name=plan.dataset_name,
        info=plan.dataset.info,
        root=None if files is None else str(files.root.absolute()),
        model=_absolute_model(plan.config.model or plan.dataset.info.model),
        weights_digest=plan.source.weights_digest,
        device=plan.device,
        compute_dtype=plan.runs[0].recipe.compute_dtype,
        runs=runs,
        groups=groups,
        sample=images_of(plan, _readable(plan)),
        mark=mark,
    )


def blocks_of(plan: Plan, outcomes: Sequence[RunOutcome], job: Job) -> Iterator[Block]:
    """All blocks that runs lack something of, made one by one as they are asked for."""
    for number, group in enumerate(job.groups):
        members = [outcomes[index] for index in group.runs]
        todo = [outcome.blocks[outcome.todo] for outcome in members]
        for block in np.unique(np.concatenate(todo)).tolist():
            made = block_of(plan, outcomes, job, number, block)
            if made is not None:
                yield made


def block_of(plan: Plan, outcomes: Sequence[RunOutcome], job: Job, group: int, block: int) -> Block | None:
    """What runs of a group lack of a block; None if that is nothing."""
    lacking = {index: outcomes[index].lacking(block) for index in job.groups[group].runs}
    positions = np.unique(np.concatenate(list(lacking.values())))
    if not len(positions):
        return None
    rows = outcomes[job.groups[group].runs[0]].rows[positions]
    order = np.argsort(rows, kind="stable")
    positions = positions[order]
    return Block(
        group=group,
        block=block,
        rows=rows[order],
        images=images_of(plan, [plan.wanted[position] for position in positions.tolist()], lacking),
        missing={
            index: {layer: mask[positions] for layer, mask in outcomes[index].missing.items()}
            for index, some in lacking.items()
            if len(some)
        },
    )


def images_of(plan: Plan, indices: Sequence[int], runs: Mapping[int, Any] | None = None) -> Images:
    """Some of the data set's samples, with the texts that runs take of each.

    Args:
        plan: whose data set it is.
        indices: into its samples.
        runs: indices of the runs that they are for; None: no texts are needed.
    """
    samples = [plan.dataset.samples[index] for index in indices]
    keys = [sample.key for sample in samples]
    texts = {}
    for index in runs or ():
        kind = text_kind(plan.runs[index].steering)
        if kind is not None and kind not in texts:
            texts[kind] = tuple(plan.runs[index].captions(plan.dataset, keys) or ())
    files = _files(plan)
    return Images(
        keys=tuple(keys),
        digests=tuple(sample.digest for sample in samples),
        files=None if files is None else tuple(os.path.relpath(files.path(key), files.root) for key in keys),
        texts=texts,
    )


def _readable(plan: Plan) -> list[int]:
    """A few of the samples that are wanted and can be read, from all over the data set."""
    indices = []
    for place in _CHECKED:
        index = plan.wanted[round(place * (len(plan.wanted) - 1))]
        with contextlib.suppress(UnreadableImageError):
            plan.dataset.image(plan.dataset.samples[index].key)
            indices.append(index)
    return list(dict.fromkeys(indices))


def text_kind(steering: Steering) -> str | None:
    """The kind under which a block carries a technique's texts an image; None: its text is fixed."""
    return _FILE_TEXTS if steering.captions is not None else steering.caption_kind


def _files(plan: Plan) -> FileDataset | None:
    """The plan's data set if each of its images is one file whose SHA-256 is the image's digest."""
    dataset = plan.dataset.images if isinstance(plan.dataset, Like) else plan.dataset
    return dataset if isinstance(dataset, FileDataset) and dataset.plain_files else None


def _textless(steering: Steering) -> Steering:
    return dataclasses.replace(steering, captions=None, caption_kind=text_kind(steering))


def _absolute(config: ExtractConfig) -> ExtractConfig:
    """The same request, meant in the same way in another working folder."""
    kind, sign, place = config.dataset.partition(":")
    named = kind in ("folder", "hub") and Path(place).expanduser().exists()
    return dataclasses.replace(
        config,
        dataset=f"{kind}{sign}{Path(place).expanduser().absolute()}" if named else config.dataset,
        store=config.store if is_remote(config.store) else str(local_path(config.store)),
        data_root=None if config.data_root is None else config.data_root.absolute(),
        steering=dataclasses.replace(config.steering, captions=None),
    )


def _absolute_model(name: str) -> str:
    prefix = _DDPM_PREFIX if name.startswith(_DDPM_PREFIX) else ""
    place = Path(name.removeprefix(prefix)).expanduser()
    return name if name in MODELS or not place.is_dir() else f"{prefix}{place.absolute()}"


def _with_paths(technique: Technique) -> Technique:
    return dataclasses.replace(technique, parts=tuple(map(_with_path, technique.parts)))


def _with_path(part: Part) -> Part:
    if part.path is None:
        return part
    if part.path.exists():
        return dataclasses.replace(part, variant=str(part.path.absolute()))
    # ``depth=PATH`` gives what is at a path a name.
    name, sign, place = str(part.variant).partition("=")
    path = Path(place).expanduser()
    return dataclasses.replace(part, variant=f"{name}{sign}{path.absolute()}") if sign and path.exists() else part

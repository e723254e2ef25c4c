"""What a worker needs for a job, looked for on its machine before its first block."""

from __future__ import annotations

import dataclasses
import uuid

import featstore.models
import featstore.techniques
from featstore.datasets import UnreadableImageError
from featstore.errors import FeatstoreError, NotFoundError
from featstore.models import ModelSource
from featstore.pipelines.cluster.images import ImageSource
from featstore.pipelines.cluster.job import Job, JobRun
from featstore.pipelines.device import compute_dtype_of, resolve_device
from featstore.recipe import canonical_json
from featstore.store.urls import is_remote, objects_at
from featstore.techniques import Steering

_REACHABLE = "use a path on a file system that all machines share, or a bucket such as s3://bucket/path"


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """Why a worker cannot do a job."""

    kind: str
    """Name of the error's class in `featstore.errors`."""
    message: str
    """What is wrong there; follows "workers at ..: "."""
    hint: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a worker has found."""

    answer: str
    """Key of the object that it has put into the store."""
    source: ModelSource
    steerings: tuple[Steering, ...]
    device: str


def look_around(job: Job, images: ImageSource) -> Seen | Problem:
    """Look for the store, the model, what steers it, the images and the device of a job."""
    steps = "store"
    try:
        answer = _store(job)
        if answer is None:
            at = (
                "the same bucket and credentials must be set up on every machine" if is_remote(job.config.store) else ""
            )
            return Problem(
                "NotFoundError", f"they do not see store {job.config.store!r} of this process", at or _REACHABLE
            )
        steps = "device"
        device = resolve_device(job.device)
        if compute_dtype_of(device) != job.compute_dtype:
            message = f"they compute in {compute_dtype_of(device)} on {device}, planned is {job.compute_dtype}"
            return Problem("IncompatibleError", message, "name one with --device that all workers have")
        steps = "weights"
        source = featstore.models.resolve(job.model, allow_pickle=job.config.steering.allow_pickle)
        if source.weights_digest != job.weights_digest:
            message = f"their weights of model {job.model!r} in {source.folder} are others than those here"
            return Problem("IncompatibleError", message, "copy the weights, or name one revision of them with --model")
        steerings = tuple(_steering(job, run, source, images) for run in job.runs)
        for run, steering in zip(job.runs, steerings, strict=True):
            if canonical_json(steering.parameters()) != canonical_json(run.recipe.parameters):
                message = f"what steers {run.recipe.technique!r} (ControlNets, LoRAs, adapters) is other than here"
                return Problem("IncompatibleError", message, "copy the same files to all machines")
        steps = "images"
        some = images.of(job.sample)
        for sample in some.samples:
            some.image(sample.key)
    except UnreadableImageError as error:
        hint = "workers read images themselves: put the data set on a file system that all machines share, or copy it"
        return Problem("NotFoundError", f"image of data set {job.info.name!r}: {error}", hint)
    except FeatstoreError as error:
        return Problem(type(error).__name__, f"{steps}: {error}", error.hint)
    return Seen(answer=answer, source=source, steerings=steerings, device=device)


def device_of(name: str | None) -> str:
    """The device that this worker computes on; errors of `resolve_device`."""
    return resolve_device(name)


def _store(job: Job) -> str | None:
    """Key of an object put beside the client's; None if that is not there."""
    objects = objects_at(job.config.store)
    try:
        objects.get(job.mark)
    except NotFoundError:
        return None
    key = f"{job.mark}.{uuid.uuid4().hex}"
    objects.put(key, b"seen", durable=False)
    return key


def _steering(job: Job, run: JobRun, source: ModelSource, images: ImageSource) -> Steering:
    """A technique with the files that this machine has for it, and the client's texts."""
    parts = tuple(part for part in run.technique.parts if part.name != "prompt")
    config = job.config
    found = featstore.techniques.resolve(
        dataclasses.replace(run.technique, parts=parts),
        dataset=images.of(job.sample),
        model=source,
        options=dataclasses.replace(config.steering, captions=None, prompt=None),
        dataset_name=config.dataset_name if config.like is None else config.like.name,
    )
    theirs = run.steering
    return dataclasses.replace(
        found,
        technique=theirs.technique,
        prompt=theirs.prompt,
        caption_kind=theirs.caption_kind,
        captions=None,
        caption_source=theirs.caption_source,
    )


__all__ = ["Problem", "Seen", "device_of", "look_around"]

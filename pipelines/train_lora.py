"""A LoRA trained on a few pictures of a data set, put where the technique ``lora`` finds it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore.datasets import Sample, UnreadableImageError
from featstore.datasets.base import UInt8Array
from featstore.errors import FeatstoreError
from featstore.pipelines.lora_plan import HELD_OUT, LoraPlan, TrainLoraConfig, make_lora_plan
from featstore.pipelines.progress import Progress, Silent

if TYPE_CHECKING:
    import torch

    from featstore.models.backbones.stable_diffusion import StableDiffusionBackbone
    from featstore.pipelines.lora_training import Course

NOTES_FORMAT = 1
"""Version of what is noted beside a LoRA."""

_TEXT_LOGGER = "featstore.models.backbones.text"
_BATCH = 8
_INTERRUPTED = "nothing was written; the same command begins anew"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainLoraReport:
    """What a training gave; `to_json` is what ``--json`` prints."""

    dataset: str
    model: str
    technique: str
    """The technique expression that finds the LoRA."""
    lora: Path
    """File of the weights."""
    images: int
    """Images that were trained on."""
    unreadable: tuple[str, ...]
    """Keys of images that could not be read and were left out."""
    course: Course
    """Steps and losses."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        course = self.course
        return {
            "dataset": self.dataset,
            "model": self.model,
            "technique": self.technique,
            "lora": str(self.lora),
            "images": self.images,
            "unreadable": list(self.unreadable),
            "steps": course.steps,
            "kept_step": course.kept_step,
            "loss": {"before": course.before, "after": course.after},
            "held_out_loss": {"before": course.held_out_before, "after": course.held_out_after},
            "seconds": self.seconds,
        }


def train_lora(config: TrainLoraConfig, progress: Progress | None = None) -> TrainLoraReport:
    """Plan a training and run it; raises what `make_lora_plan` and `execute_lora` do."""
    return execute_lora(make_lora_plan(config), progress)


def execute_lora(plan: LoraPlan, progress: Progress | None = None) -> TrainLoraReport:
    """Train what was planned and write it.

    Files appear at the very end: an interruption leaves nothing behind.

    Raises:
        FeatstoreError: if no image can be read, or the loss becomes infinite.
        StorageError: if the result cannot be written.
    """
    progress = progress or Silent()
    began = time.monotonic()
    try:
        chosen = _read(plan, progress)
        course, weights = _train(plan, chosen, progress)
        from featstore.pipelines.lora_file import write_lora

        lora = write_lora(plan.folder, weights, _notes(plan, chosen, course))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_INTERRUPTED) from None
    finally:
        progress.stop()
    return TrainLoraReport(
        dataset=plan.dataset_name,
        model=plan.source.name,
        technique=plan.technique,
        lora=lora,
        images=len(chosen.samples),
        unreadable=tuple(chosen.unreadable),
        course=course,
        seconds=time.monotonic() - began,
    )


@dataclasses.dataclass(slots=True, kw_only=True)
class _Chosen:
    """The images of a training, N to train on and M held out, resized."""

    samples: list[Sample]
    texts: list[str]
    """One a sample."""
    images: list[UInt8Array]
    """uint8 (H, W, 3), one a sample."""
    held_out: list[Sample]
    held_out_images: list[UInt8Array]
    unreadable: list[str]
    """Keys of images that were left out."""


def _read(plan: LoraPlan, progress: Progress) -> _Chosen:
    unreadable: list[str] = []
    candidates = iter(plan.candidates)
    progress.start("read images", plan.images, "images")
    found = _readable(plan, candidates, plan.images, unreadable, progress)
    progress.stop()
    for key in unreadable:
        progress.note(f"left out, for it cannot be read: {key}")
    if not found:
        raise FeatstoreError(f"none of the {len(plan.candidates)} images of {plan.dataset_name!r} can be read")
    held_out = _readable(plan, plan.others or candidates, HELD_OUT, [], Silent())
    return _Chosen(
        samples=[sample for sample, _ in found],
        texts=[plan.captions.text(sample.key) for sample, _ in found],
        images=[image for _, image in found],
        held_out=[sample for sample, _ in held_out],
        held_out_images=[image for _, image in held_out],
        unreadable=unreadable,
    )


def _readable(
    plan: LoraPlan, samples: Iterable[Sample], count: int, unreadable: list[str], progress: Progress
) -> list[tuple[Sample, UInt8Array]]:
    """The first ``count`` images that can be read, at the model's input size; keys of others go to ``unreadable``."""
    from featstore.extraction.images import prepare

    found: list[tuple[Sample, UInt8Array]] = []
    for sample in samples:
        try:
            found.append((sample, prepare(plan.dataset.image(sample.key), plan.height_px, plan.width_px)))
            progress.advance()
        except UnreadableImageError:
            unreadable.append(sample.key)
        if len(found) == count:
            break
    return found


def _train(plan: LoraPlan, chosen: _Chosen, progress: Progress) -> tuple[Course, bytes]:
    import torch

    from featstore.models.backbones.stable_diffusion import StableDiffusionBackbone
    from featstore.pipelines.lora_file import lora_bytes
    from featstore.pipelines.lora_pupil import Pupil
    from featstore.pipelines.lora_training import Once, Training, repeatable

    half = plan.device.startswith("cuda") and torch.cuda.is_bf16_supported()
    logger, once = logging.getLogger(_TEXT_LOGGER), Once()
    with repeatable(plan.device), plan.source.load(plan.device, "bfloat16" if half else "float32") as backbone:
        assert isinstance(backbone, StableDiffusionBackbone)
        latents = _latents(backbone, chosen.images)
        held_out = _latents(backbone, chosen.held_out_images) if chosen.held_out else None
        pupil = Pupil(backbone, plan.config, (plan.height_px, plan.width_px))
        training = Training(
            pupil,
            latents,
            chosen.texts,
            held_out,
            plain_prompt=plan.dataset.info.plain_prompt,
            config=plan.config,
        )
        logger.addFilter(once)
        try:
            course = training.run(plan.steps, progress, stop_early=not plan.config.overfit)
        finally:
            logger.removeFilter(once)
        return course, lora_bytes(pupil)


def _latents(backbone: StableDiffusionBackbone, images: list[UInt8Array]) -> torch.Tensor:
    """(N, C, h, w) of uint8 (H, W, 3) images, on the model's device."""
    import torch

    from featstore.extraction.images import to_pixels

    with torch.no_grad():
        return torch.cat(
            [
                backbone.encode_images(to_pixels(np.stack(images[start : start + _BATCH])))
                for start in range(0, len(images), _BATCH)
            ]
        )


def _notes(plan: LoraPlan, chosen: _Chosen, course: Course) -> dict[str, Any]:
    """What is written beside the weights: all that they come from, and no paths of this machine."""
    from featstore.pipelines.lora_file import versions

    config = plan.config
    return {
        "featstore_lora": NOTES_FORMAT,
        "dataset": plan.dataset_name,
        "model": plan.source.name,
        "weights_digest": plan.source.weights_digest,
        "variant": plan.variant,
        "images": [
            {"key": sample.key, "digest": sample.digest, "text": text}
            for sample, text in zip(chosen.samples, chosen.texts, strict=True)
        ],
        "held_out": [{"key": sample.key, "digest": sample.digest} for sample in chosen.held_out],
        "hyperparameters": {
            "rank": config.rank,
            "alpha": config.alpha,
            "learning_rate": config.learning_rate,
            "text_learning_rate": config.text_learning_rate,
            "schedule": config.schedule,
            "steps": plan.steps,
            "batch_size": config.batch_size,
            "image_size_px": [plan.height_px, plan.width_px],
            "captions": plan.captions.kind,
            "seed": config.seed,
        },
        "course": dataclasses.asdict(course),
        "device": plan.device.partition(":")[0],
        "versions": versions(),
    }

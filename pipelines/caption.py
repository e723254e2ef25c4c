"""Captions of a data set's images, written by a captioner into a caption file.

What the file has already stays: texts of unchanged images, texts without a digest (written by hand), texts of other
data sets. So an interrupted job goes on where it was, and its file is the same in the end.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import featstore.datasets
from featstore.datasets import Dataset, Sample, UnreadableImageError
from featstore.datasets.captions import CaptionDocument, read_document, write_document
from featstore.errors import BadRequestError, StorageError
from featstore.models.captioners import CaptionerSource, open_captioner
from featstore.pipelines.device import compute_dtype_of, resolve_device
from featstore.pipelines.memory import peak_rss_bytes
from featstore.pipelines.plan import select
from featstore.pipelines.progress import Progress, Silent

SAVE_EVERY_IMAGES = 100
"""The file is written after so many new texts, and at the end, whatever ends it."""

_MAX_THREADS = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaptionConfig:
    """What the user asked to have captioned."""

    dataset: str
    """Name of a known data set, or ``folder:PATH``."""
    captioner: str
    """Folder of a captioner, or its id on the Hugging Face Hub."""
    out: Path = Path("captions.json")
    """The caption file."""
    prompt: str | None = None
    """What the captioner is asked, or how its texts begin; None: its kind's own."""
    split: str | None = None
    """Only this split's images; None: all."""
    limit: int | None = None
    """Only the first so many images; None: all."""
    batch_size: int = 8
    """Images at once."""
    max_new_tokens: int = 64
    """Where a text is broken off."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``..; None: a GPU where there is one."""
    data_root: Path | None = None
    """Where data sets lie; None: ``$FEATSTORE_DATA``, else ``./data``."""

    def __post_init__(self) -> None:
        """Refuse values that need nothing else to be known wrong."""
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadRequestError(f"--{name.replace('_', '-')} {value} is not 1 or more")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaptionPlan:
    """Everything that captioning would do."""

    config: CaptionConfig
    dataset: Dataset
    source: CaptionerSource
    device: str
    prompt: str
    """What the captioner is asked."""
    wanted: tuple[Sample, ...]
    """The images asked for, after split and limit."""
    document: CaptionDocument
    """What the file holds, without the texts that are to be replaced."""

    @property
    def todo(self) -> tuple[Sample, ...]:
        """The images that have no text yet."""
        return tuple(sample for sample in self.wanted if sample.key not in self.document.texts)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaptionReport:
    """What captioning did; `to_json` is what ``--json`` prints."""

    plan: CaptionPlan
    captioned: int
    """New texts."""
    failed: dict[str, str]
    """Keys of images that could not be read, each with the reason."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        return {
            "dataset": self.plan.dataset.info.name,
            "captioner": self.plan.source.name,
            "captions": str(self.plan.config.out),
            "images": len(self.plan.wanted),
            "captioned": self.captioned,
            "reused": len(self.plan.wanted) - len(self.plan.todo),
            "failed": [{"key": key, "reason": reason} for key, reason in self.failed.items()],
            "seconds": self.seconds,
            "images_per_second": self.captioned / self.seconds if self.seconds > 0 else 0.0,
            "peak_rss_bytes": peak_rss_bytes(),
        }


def plan_captions(config: CaptionConfig) -> CaptionPlan:
    """Find out which images lack a text. Loads no weights.

    Raises:
        BadRequestError: for anything the user named that does not exist or cannot be; for a file that another
            captioner, or the same one asked otherwise, has written.
        NotFoundError: if data or captioner are absent and cannot be fetched.
        StorageError: if the file cannot be written.
    """
    dataset = featstore.datasets.resolve(config.dataset, data_root=config.data_root)
    device = resolve_device(config.device)
    indices = select(dataset, split=config.split, limit=config.limit)
    _check_place(config.out)
    document = read_document(config.out) if config.out.exists() else CaptionDocument()
    source = open_captioner(config.captioner)
    prompt = source.kind.prompt if config.prompt is None else config.prompt
    identity = {"digest": source.digest, "prompt": prompt, "max_new_tokens": config.max_new_tokens}
    _check_captioner(config.out, document.captioner, identity)
    samples = tuple(dataset.samples[index] for index in indices)
    changed = {s.key for s in samples if document.digests.get(s.key, s.digest) != s.digest}
    return CaptionPlan(
        config=config,
        dataset=dataset,
        source=source,
        device=device,
        prompt=prompt,
        wanted=samples,
        document=CaptionDocument(
            texts={key: text for key, text in document.texts.items() if key not in changed},
            digests={key: digest for key, digest in document.digests.items() if key not in changed},
            captioner={"name": source.name, **identity},
        ),
    )


def caption(config: CaptionConfig, progress: Progress | None = None) -> CaptionReport:
    """Plan and caption; see `plan_captions` for what is refused and `execute_captions` for the rest."""
    return execute_captions(plan_captions(config), progress or Silent())


def execute_captions(plan: CaptionPlan, progress: Progress) -> CaptionReport:
    """Write the texts that a plan lacks.

    An image that cannot be read is skipped and named in the report; it is tried again by the next call.

    Args:
        plan: what to do.
        progress: told of every batch.

    Raises:
        NotFoundError: if weights are missing.
        StorageError: if the file cannot be written; what was written stays.
    """
    start = time.perf_counter()
    new: dict[str, Sample] = {}
    failed: dict[str, str] = {}
    if plan.todo:
        _compute(plan, new, failed, progress)
    return CaptionReport(plan=plan, captioned=len(new), failed=failed, seconds=time.perf_counter() - start)


def _compute(plan: CaptionPlan, new: dict[str, Sample], failed: dict[str, str], progress: Progress) -> None:
    config = plan.config
    captioner = plan.source.load(plan.device, compute_dtype_of(plan.device))
    texts, digests = dict(plan.document.texts), dict(plan.document.digests)
    unsaved = 0
    progress.start("captioning", len(plan.todo), "images")
    try:
        for samples, images in _batches(plan, failed, progress):
            written = captioner.captions(
                images, prompt=plan.prompt, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size
            )
            unsaved += len(samples)
            for sample, text in zip(samples, written, strict=True):
                texts[sample.key], digests[sample.key], new[sample.key] = text, sample.digest, sample
            progress.advance(len(samples))
            if unsaved >= SAVE_EVERY_IMAGES:
                _save(plan, texts, digests)
                unsaved = 0
    finally:
        progress.stop()
        if unsaved:
            _save(plan, texts, digests)


def _batches(
    plan: CaptionPlan, failed: dict[str, str], progress: Progress
) -> Iterator[tuple[list[Sample], list[np.ndarray]]]:
    """Whole batches of images that can be read, read two batches ahead in threads."""
    size = plan.config.batch_size
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), thread_name_prefix="featstore-read") as pool:
        todo, reads = iter(plan.todo), dict[str, Future[np.ndarray]]()
        ahead: list[Sample] = []
        samples: list[Sample] = []
        images: list[np.ndarray] = []
        try:
            while True:
                while len(ahead) < 2 * size and (following := next(todo, None)) is not None:
                    reads[following.key] = pool.submit(plan.dataset.image, following.key)
                    ahead.append(following)
                if not ahead:
                    break
                sample = ahead.pop(0)
                try:
                    images.append(reads.pop(sample.key).result())
                    samples.append(sample)
                except UnreadableImageError as error:
                    failed[sample.key] = str(error)
                    progress.advance()
                if len(samples) == size:
                    yield samples, images
                    samples, images = [], []
            if samples:
                yield samples, images
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _save(plan: CaptionPlan, texts: dict[str, str], digests: dict[str, str]) -> None:
    """Write the file in the data set's order, which does not depend on interruptions; other texts come after."""
    order = dict.fromkeys([sample.key for sample in plan.dataset.samples if sample.key in texts])
    keys = [*order, *(key for key in texts if key not in order)]
    document = CaptionDocument(
        texts={key: texts[key] for key in keys},
        digests={key: digests[key] for key in keys if key in digests},
        captioner=plan.document.captioner,
    )
    write_document(plan.config.out, document)


def _check_place(out: Path) -> None:
    if out.is_dir():
        raise BadRequestError(f"captions file {out} is a folder", hint="as in --out captions.json")
    folder = out.absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error.strerror or str(error)) from error
    if not os.access(folder, os.W_OK):
        raise _unwritable(folder, "not permitted")


def _unwritable(folder: Path, reason: str) -> StorageError:
    error = StorageError(f"{folder} cannot be written: {reason}", hint="--out names another place")
    error.exit_code = BadRequestError.exit_code  # nothing was started
    return error


def _check_captioner(out: Path, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Texts of two captioners in one file would be a mixture that nobody could tell apart."""
    odd = [name for name, value in now.items() if before is not None and before.get(name) != value]
    if before is None or not odd:
        return
    what = ", ".join(f"{name} {str(before.get(name))[:40]!r}" for name in odd)
    raise BadRequestError(
        f"captions file {out} was written by {before.get('name')!r} with other settings than asked for now: {what}",
        hint="--out names another file",
    )

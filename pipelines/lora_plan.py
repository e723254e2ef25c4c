"""What a LoRA training would do, found out before a picture is decoded or a weight is loaded. No torch."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import Any

import featstore.datasets
import featstore.models
from featstore.datasets import Dataset, Sample
from featstore.errors import BadRequestError, NotFoundError, StorageError, unknown_name
from featstore.models import ModelSource
from featstore.models.headers import adaptable_shapes
from featstore.models.trained import LORA_FILE, read_notes, trained_lora
from featstore.pipelines.device import resolve_device
from featstore.pipelines.lora_captions import LoraCaptions, open_captions

OVERFIT = "overfit"
"""Variant that ``--overfit`` writes."""
SCHEDULES = ("constant", "cosine")
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Linear layers of the UNet's attention that get low-rank weights."""
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Linear layers of the text encoders' attention that get low-rank weights."""
HELD_OUT = 8
"""Images beside the sample, at most, that say when to stop."""

_TRAIN, _VALIDATION, _TEST = "train", "val", "test"
_STEPS_PER_IMAGE, _MAX_STEPS, _OVERFIT_TIMES = 100, 3000, 3
_BYTES_PER_PARAMETER = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainLoraConfig:
    """What to train, and on what."""

    dataset: str
    """Name of a known data set, or ``folder:PATH``."""
    model: str | None = None
    """Model name or path of a diffusers folder; None: the data set's default."""
    images: int = 30
    """Images of the random sample; all there are if fewer."""
    overfit: bool = False
    """Train three times as long, without stopping early, and write the variant ``overfit``."""
    steps: int | None = None
    """Steps of the optimiser, at most; None: 100 an image, 3000 at most."""
    split: str | None = None
    """Split that the sample is drawn from; None: ``train`` where there is one, else all but ``val`` and ``test``."""
    captions: str = "empty"
    """Texts of the images: ``empty``, ``tags``, ``sentences``, or a file of one an image."""
    rank: int = 64
    """Rank of the added matrices."""
    alpha: float = 32.0
    """What is added is scaled by alpha / rank."""
    learning_rate: float = 1e-4
    """Of the UNet's part."""
    text_learning_rate: float = 5e-5
    """Of the text encoders' part; 0: they are left as they are."""
    schedule: str = "constant"
    """How the rates go on: ``constant``, or ``cosine`` down to 0."""
    batch_size: int = 1
    """Images of one step."""
    image_size_px: int | tuple[int, int] | None = None
    """Side of a square model input, or its (height, width); None: the data set's or the model's default."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``..; None: a GPU where there is one."""
    seed: int = 0
    """Of the sample, the initial weights, noise and timesteps."""
    data_root: Path | None = None
    """Where data sets lie; None: ``$FEATSTORE_DATA``, else ``./data``."""
    dataset_name: str | None = None
    """Name that the LoRA is found by; None: the data set's own."""
    out: Path | None = None
    """Folder that it is written to; None: where ``lora`` finds it as the data set's default."""
    overwrite: bool = False
    """Replace a LoRA that is there."""

    def __post_init__(self) -> None:
        """Refuse values that need nothing else to be known wrong."""
        for name in ("images", "steps", "rank", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadRequestError(f"--{name.replace('_', '-')} {value} is not 1 or more")
        for name in ("alpha", "learning_rate", "text_learning_rate"):
            value, least = getattr(self, name), 0.0
            allowed = value >= least if name == "text_learning_rate" else value > least
            if not (math.isfinite(value) and allowed):
                or_zero = " or 0" if name == "text_learning_rate" else ""
                raise BadRequestError(f"--{name.replace('_', '-')} {value} is not a positive number{or_zero}")
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoraPlan:
    """Everything that a training would do."""

    config: TrainLoraConfig
    dataset: Dataset
    dataset_name: str
    source: ModelSource
    device: str
    height_px: int
    width_px: int
    candidates: tuple[Sample, ...]
    """The images of the split, in the random order in which they are taken."""
    images: int
    """How many of them are trained on."""
    others: tuple[Sample, ...]
    """Images of another split that say when to stop, where the sample leaves none of its own."""
    captions: LoraCaptions
    steps: int
    parameters: int
    """Trainable numbers."""
    folder: Path
    """Where the LoRA is written."""

    @property
    def variant(self) -> str | None:
        """``overfit``, or None for the well-trained one."""
        return OVERFIT if self.config.overfit else None

    @property
    def file(self) -> Path:
        """File of the weights."""
        return self.folder / LORA_FILE

    @property
    def file_bytes(self) -> int:
        """About how large the file will be: half precision."""
        return self.parameters * _BYTES_PER_PARAMETER

    @property
    def stops_early(self) -> bool:
        """Whether images beside the sample say when to stop."""
        return not self.config.overfit and bool(self.others or len(self.candidates) > self.images)

    @property
    def technique(self) -> str:
        """The technique expression that finds the LoRA."""
        if self.config.out is None:
            return f"lora:{OVERFIT}" if self.config.overfit else "lora"
        text = str(self.config.out)
        return f"lora:{text if '/' in text else './' + text}"

    def to_json(self) -> dict[str, Any]:
        """The plan for ``--dry-run --json``."""
        return {
            "dataset": self.dataset_name,
            "model": self.source.name,
            "device": self.device,
            "technique": self.technique,
            "images": self.images,
            "steps": self.steps,
            "batch_size": self.config.batch_size,
            "image_size_px": [self.height_px, self.width_px],
            "parameters": self.parameters,
            "bytes": self.file_bytes,
            "lora": str(self.file),
        }


def make_lora_plan(config: TrainLoraConfig) -> LoraPlan:
    """Find out what ``config`` asks for.

    Raises:
        BadRequestError: for anything the user named that does not exist or cannot be, or a LoRA that is there.
        NotFoundError: if data or weights are absent; the hint says where they belong.
        StorageError: if the folder of the result cannot be written.
    """
    dataset = featstore.datasets.resolve(config.dataset, data_root=config.data_root)
    source = featstore.models.resolve(config.model or dataset.info.model)
    if not source.trains_lora:
        raise BadRequestError(
            f"LoRAs are trained for Stable Diffusion's UNets; model {source.name!r} is none ({type(source).__name__})",
            hint="`featstore models` lists what there is",
        )
    size = config.image_size_px or dataset.info.image_size_px or source.default_image_size_px
    height, width = size if isinstance(size, tuple) else (size, size)
    source.check_image_size(height, width)
    device = resolve_device(config.device)
    name = config.dataset_name or dataset.info.name
    folder = _folder(config, source, name)
    candidates = _candidates(dataset, config)
    images = min(config.images, len(candidates))
    captions = open_captions(config.captions, dataset, config.dataset)
    captions.check([sample.key for sample in candidates[:images]])
    steps = config.steps or min(_STEPS_PER_IMAGE * images, _MAX_STEPS) * (_OVERFIT_TIMES if config.overfit else 1)
    # Last, because it reads the headers of the weights.
    parameters = trainable_parameters(source, config.rank, text=config.text_learning_rate > 0)
    return LoraPlan(
        config=config,
        dataset=dataset,
        dataset_name=name,
        source=source,
        device=device,
        height_px=height,
        width_px=width,
        candidates=candidates,
        images=images,
        others=() if images < len(candidates) else _others(dataset, candidates, config.seed),
        captions=captions,
        steps=steps,
        parameters=parameters,
        folder=folder,
    )


def trainable_parameters(source: ModelSource, rank: int, *, text: bool) -> int:
    """How many numbers low-rank weights of this rank have, from the headers of the model's weight files.

    Args:
        source: a model with a UNet and text encoders.
        rank: of the added matrices.
        text: whether the text encoders get some too.

    Raises:
        NotFoundError: if weights are missing.
        BadRequestError: if they are pickles.
    """
    shapes = adaptable_shapes(source) or {}
    total = 0
    for component, named in shapes.items():
        targets = UNET_TARGETS if component == "unet" else TEXT_TARGETS if text else ()
        for name, shape in named.items():
            if name.removesuffix(".weight").endswith(tuple(f".{target}" for target in targets)):
                total += rank * (shape[0] + shape[1])
    return total


def _folder(config: TrainLoraConfig, source: ModelSource, name: str) -> Path:
    variant = OVERFIT if config.overfit else None
    if config.out is not None:
        folder = config.out.expanduser()
    elif source.ships_lora(name, variant):
        raise BadRequestError(
            f"model {source.name!r} comes with a LoRA {variant or ''}".rstrip()
            + f" for data set {name!r}, which stays what `lora` finds",
            hint="--out DIR writes one beside it, which lora:DIR then uses",
        )
    else:
        folder = trained_lora(source.name, name, variant, source.weights_root)
    file = folder / LORA_FILE
    if file.exists() and not config.overwrite:
        notes = read_notes(folder) or {}
        images = notes.get("images")
        of = f", trained on {len(images)} images of {notes.get('dataset')!r}" if isinstance(images, list) else ""
        raise BadRequestError(
            f"there is a LoRA in {folder}{of}", hint="--overwrite replaces it, --out DIR writes to another folder"
        )
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise BadRequestError(f"{folder} cannot be a folder: {there} is a file")
    if not os.access(there, os.W_OK):
        raise StorageError(f"{there} cannot be written", hint="--out or $FEATSTORE_WEIGHTS names another place")
    return folder


def _candidates(dataset: Dataset, config: TrainLoraConfig) -> tuple[Sample, ...]:
    splits = {sample.split for sample in dataset.samples}
    if config.split is not None and config.split not in splits:
        raise unknown_name("split", config.split, splits)
    wanted = {config.split or _TRAIN} & splits or splits - {_VALIDATION, _TEST}
    if not wanted:
        raise NotFoundError(
            f"data set {dataset.info.name!r} has no images to train on: only {', '.join(sorted(splits))}",
            hint="--split takes them all the same",
        )
    return _shuffled([sample for sample in dataset.samples if sample.split in wanted], config.seed)


def _others(dataset: Dataset, candidates: tuple[Sample, ...], seed: int) -> tuple[Sample, ...]:
    taken = {sample.digest for sample in candidates}
    rest = [s for s in dataset.samples if s.split == _VALIDATION and s.digest not in taken]
    return _shuffled(rest, seed)


def _shuffled(samples: list[Sample], seed: int) -> tuple[Sample, ...]:
    """A random order that depends on the images and the seed alone, not on how the data set lists them."""
    return tuple(sorted(samples, key=lambda s: hashlib.sha256(f"{seed} {s.digest} {s.key}".encode()).digest()))

"""What an extraction would do, found out before any weight is loaded.

Identity first: the data set is listed and digested, techniques are resolved to files and digests,
recipes get their fingerprints, and the store is asked which rows it has. Everything a user can get
wrong is refused here. A finished extraction never imports torch, because nothing is left to do.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import featstore.datasets
import featstore.models
import featstore.store
import featstore.techniques
from featstore.datasets import Dataset, DatasetInfo
from featstore.datasets.like import Like
from featstore.errors import BadRequestError, NotFoundError, unknown_name
from featstore.models import ModelSource
from featstore.pipelines.device import compute_dtype_of, resolve_device
from featstore.pipelines.presence import Presence
from featstore.pipelines.rates import Rates
from featstore.pipelines.reduction import components_of, continued, reduced_shapes, reduction_of, sample_of
from featstore.pipelines.space import require_space
from featstore.recipe import PRECISIONS, TRAIN_TIMESTEPS, Recipe
from featstore.store import Run, SampleTable, Store
from featstore.store import precision as precisions
from featstore.store.urls import local_path
from featstore.techniques import Steering, SteeringOptions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExtractConfig:
    """What the user asked to extract."""

    dataset: str
    """Name of a known data set, or ``folder:PATH``."""
    techniques: str
    """Technique expression, e.g. ``prompt,controlnet:canny+lora``."""
    store: str = "features.zarr"
    """URL of the store."""
    model: str | None = None
    """Model name or path of a diffusers folder; None: the data set's default."""
    timesteps: tuple[int, ...] = (50,)
    """What the UNet is fed; one run each."""
    layers: str | None = None
    """Presets and layer names, comma separated; None: the model's default preset."""
    image_size_px: int | tuple[int, int] | None = None
    """Side of a square model input, or its (height, width); None: the data set's or the model's default."""
    split: str | None = None
    """Only this split's images; None: all."""
    limit: int | None = None
    """Only the first so many images; None: all."""
    keys: tuple[str, ...] | None = None
    """Only these images; None: all."""
    precision: str = "float16"
    """Element type on disk."""
    reduce: str | None = None
    """``pca:N``: project the channels of layers that have more than N onto N; None: keep them all."""
    compress: bool = False
    """Whether maps of new runs lie behind zstd. A run keeps what it was created with."""
    batch_size: int | None = None
    """Rows of every forward pass of a new run; None: what fits the device. A run keeps what it was created with."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``..; None: a GPU where there is one."""
    steering: SteeringOptions = dataclasses.field(default_factory=SteeringOptions)
    """What is asked of all techniques: texts and scales."""
    denoise_from: int | None = None
    """Timestep that is noised to, and denoised from down to each of ``timesteps``; None: one noised pass."""
    noise_ensemble: int = 1
    """Draws of the noise that maps are averaged over."""
    seed: int = 0
    """Seed of the noise."""
    data_root: Path | None = None
    """Where data sets lie; None: ``$FEATSTORE_DATA``, else ``./data``."""
    dataset_name: str | None = None
    """Name of the data set in the store; None: the data set's own."""
    like: DatasetInfo | None = None
    """Another data set's facts, for images that are to be treated like its own; None: the data set's."""
    overwrite: bool = False
    """Compute what is asked for although the store has it, in its place."""

    def __post_init__(self) -> None:
        """Refuse values that need nothing else to be known wrong."""
        for timestep in self.timesteps:
            if not 0 <= timestep < TRAIN_TIMESTEPS:
                raise BadRequestError(f"timestep {timestep} is outside 0..{TRAIN_TIMESTEPS - 1}")
        if len(set(self.timesteps)) != len(self.timesteps):
            raise BadRequestError(f"a timestep is listed twice: {', '.join(map(str, self.timesteps))}")
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        if self.reduce is not None:
            components_of(self.reduce)
        if self.denoise_from is not None:
            for timestep in self.timesteps:
                if not timestep < self.denoise_from < TRAIN_TIMESTEPS:
                    raise BadRequestError(
                        f"--denoise-from {self.denoise_from} is outside {timestep + 1}..{TRAIN_TIMESTEPS - 1}: "
                        f"denoising ends at the timestep of the pass, {timestep}"
                    )
        height, width = (None, None) if self.image_size_px is None else _pair(self.image_size_px)
        for name, value in (
            ("--limit", self.limit),
            ("--batch-size", self.batch_size),
            ("--noise-ensemble", self.noise_ensemble),
            ("--image-size", height),
            ("--image-size", width),
        ):
            if value is not None and value < 1:
                raise BadRequestError(f"{name} {value} is not 1 or more")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """One run of the plan: its recipe and what is left of it."""

    recipe: Recipe
    steering: Steering
    layers: dict[str, tuple[int, int, int]]
    """Shapes (C, H, W) of the layers asked for."""
    run: Run | None
    """The run in the store; None: it is new."""
    missing: dict[str, np.ndarray]
    """For each layer, a mask (N,) over the wanted samples: True where the row must be computed."""
    to_fit: dict[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    """The model's own shapes (C, H, W) of layers that are reduced, and whose projection is still to be fitted."""
    fit_images: int = 0
    """Images that it is fitted on, one pass each."""

    @property
    def reduced(self) -> list[str]:
        """Those of the layers asked for whose channels are projected onto fewer."""
        there = {} if self.run is None else self.run.layers
        return [name for name in self.layers if name in self.to_fit or (name in there and there[name].reduced)]

    @property
    def todo(self) -> np.ndarray:
        """Mask (N,) over the wanted samples: True where at least one layer's row must be computed."""
        todo: np.ndarray = np.logical_or.reduce(list(self.missing.values()))
        return todo

    @property
    def bytes_per_image(self) -> dict[str, int]:
        """Bytes of one image, by layer; scales included where it is int8."""
        stored = precisions.of(self.recipe.precision).stored
        return {name: precisions.image_bytes(shape, stored) for name, shape in self.layers.items()}

    @property
    def bytes_todo(self) -> int:
        """Bytes that this run would add to the store."""
        # A basis and its copy in the catalog.
        bases = sum(8 * (1 + self.recipe.components) * channels for channels, _, _ in self.to_fit.values())
        return bases + sum(self.bytes_per_image[name] * int(mask.sum()) for name, mask in self.missing.items())

    def captions(self, dataset: Dataset, keys: Sequence[str]) -> list[str] | None:
        """A text for each of ``keys`` where the technique takes one an image; None where its text is fixed."""
        kind, captions = self.steering.caption_kind, self.steering.captions
        if captions is not None:
            return [captions.texts[key] for key in keys]
        return None if kind is None else [dataset.caption(key, kind) for key in keys]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that an extraction would do."""

    config: ExtractConfig
    dataset: Dataset
    dataset_name: str
    source: ModelSource
    device: str
    wanted: tuple[int, ...]
    """Indices into the data set's samples: the images asked for, after split and limit."""
    runs: tuple[PlannedRun, ...]
    seconds: float | None
    """Estimate from what this machine was measured at before; None: never measured."""

    @property
    def passes_todo(self) -> int:
        """Forward passes to run, one an image, technique and timestep."""
        return sum(int(run.todo.sum()) for run in self.runs)

    @property
    def fit_passes(self) -> int:
        """Forward passes that only serve to fit projections."""
        return sum(run.fit_images for run in self.runs)

    @property
    def bytes_todo(self) -> int:
        """Bytes that the extraction would add to the store."""
        return sum(run.bytes_todo for run in self.runs)

    def compressed(self, run: PlannedRun) -> bool:
        """Whether the maps of one of the runs lie behind zstd, so that its bytes are an upper bound."""
        return self.config.compress if run.run is None else run.run.compressed

    def to_json(self) -> dict[str, Any]:
        """The plan for `--dry-run --json`."""
        return {
            "dataset": self.dataset_name,
            "model": self.source.name,
            "device": self.device,
            "images": len(self.wanted),
            "runs": [
                {
                    "technique": run.recipe.technique,
                    "timestep": run.recipe.timestep,
                    "fingerprint": run.recipe.fingerprint,
                    "cached": len(self.wanted) - int(run.todo.sum()),
                    "compute": int(run.todo.sum()),
                    "bytes": run.bytes_todo,
                    "layers": {name: list(shape) for name, shape in run.layers.items()},
                    **({"reduced": run.reduced, "fit_images": run.fit_images} if run.recipe.components else {}),
                }
                for run in self.runs
            ],
            "bytes": self.bytes_todo,
            "seconds": self.seconds,
        }


def make_plan(config: ExtractConfig, *, device: str | None = None) -> Plan:
    """Find out what ``config`` asks for and what of it is already in the store.

    Args:
        config: what to extract.
        device: what other machines compute on, which is not looked for on this one; None: this one computes.

    Raises:
        BadRequestError: for anything the user named that does not exist or cannot be.
        NotFoundError: if data or weights are absent; the hint says where they belong.
        StorageError: if the store cannot be written or would not hold the features.
    """
    techniques = featstore.techniques.parse(config.techniques)
    dataset = featstore.datasets.resolve(config.dataset, data_root=config.data_root)
    if config.like is not None:
        dataset = Like(dataset, config.like)
    wanted = select(dataset, split=config.split, limit=config.limit, keys=config.keys)
    device = device or resolve_device(config.device)
    model = config.model or dataset.info.model
    # What its configuration alone can refuse is refused before weights are fetched.
    described = featstore.models.describe(model)
    height, width = _pair(config.image_size_px or dataset.info.image_size_px or described.default_image_size_px)
    described.check_image_size(height, width)
    described.expand_layers(config.layers or described.default_layers)
    source = featstore.models.resolve(model, allow_pickle=config.steering.allow_pickle)
    steerings = [
        featstore.techniques.resolve(
            technique,
            dataset=dataset,
            model=source,
            options=config.steering,
            dataset_name=config.dataset_name if config.like is None else config.like.name,
            asked=_asked(config, dataset),
        )
        for technique in techniques
    ]
    recipes = [
        (
            Recipe(
                model=source.name,
                weights_digest=source.weights_digest,
                technique=steering.expression,
                parameters=steering.parameters(),
                timestep=timestep,
                denoise_from=config.denoise_from,
                scheduler=source.scheduler,
                seed=config.seed,
                noise_ensemble=config.noise_ensemble,
                height_px=height,
                width_px=width,
                compute_dtype=compute_dtype_of(device),
                precision=config.precision,
                reduce=None if config.reduce is None else reduction_of(dataset, components_of(config.reduce)),
            ),
            steering,
        )
        for steering in steerings
        for timestep in config.timesteps
    ]
    name = config.dataset_name or dataset.info.name
    store = _open_if_there(config.store)
    stored = store.dataset(name) if store is not None and name in store.datasets() else None
    if stored is not None:
        recipes = [(continued(stored, recipe), steering) for recipe, steering in recipes]
    found = [stored.find(recipe) if stored is not None else None for recipe, _ in recipes]
    layers, whole = _layers(source, config, (height, width), found)
    runs = []
    # To overwrite is to have nothing.
    presence = Presence(dataset, wanted, None if config.overwrite else stored)
    for (recipe, steering), run in zip(recipes, found, strict=True):
        missing = presence.missing(run, layers)
        known = {} if run is None else run.layers
        to_fit = {layer: shape for layer, shape in whole.items() if shape != layers[layer] and layer not in known}
        fit_images = len(sample_of(dataset, recipe)) if to_fit else 0
        one = PlannedRun(
            recipe=recipe,
            steering=steering,
            layers=layers,
            run=run,
            missing=missing,
            to_fit=to_fit,
            fit_images=fit_images,
        )
        runs.append(one)
        if run is not None and one.todo.any():
            for layer in one.reduced:
                if layer in known:
                    run.basis(layer)  # Found damaged now rather than when weights are loaded.
    _check_captions(config, dataset, sorted({*wanted, *range(max(one.fit_images for one in runs))}), steerings)
    plan = Plan(
        config=config,
        dataset=dataset,
        dataset_name=name,
        source=source,
        device=device,
        wanted=wanted,
        runs=tuple(runs),
        seconds=Rates.load().estimate_seconds(
            (Rates.key(run.recipe, device), int(run.todo.sum()) + run.fit_images) for run in runs if run.todo.any()
        ),
    )
    _check_space(config.store, plan.bytes_todo)
    return plan


def select(
    dataset: Dataset, *, split: str | None, limit: int | None, keys: Sequence[str] | None = None
) -> tuple[int, ...]:
    """Indices of the samples of ``split`` with one of ``keys`` (None: all), the first ``limit`` of them.

    Raises:
        BadRequestError: if no sample has that split, or one of the keys.
    """
    splits = {sample.split for sample in dataset.samples}
    if split is not None and split not in splits:
        raise unknown_name("split", split, splits)
    chosen = None if keys is None else set(keys)
    if chosen is not None and (strangers := chosen - {sample.key for sample in dataset.samples}):
        raise unknown_name("image", min(strangers), [sample.key for sample in dataset.samples])
    indices = [
        index
        for index, sample in enumerate(dataset.samples)
        if split in (None, sample.split) and (chosen is None or sample.key in chosen)
    ]
    return tuple(indices[:limit])


def sample_table(dataset: Dataset) -> SampleTable:
    """The data set's samples as the store keeps them."""
    return SampleTable(
        keys=tuple(sample.key for sample in dataset.samples),
        digests=tuple(sample.digest for sample in dataset.samples),
        splits=tuple(sample.split for sample in dataset.samples),
    )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size that may be the side of a square."""
    return size if isinstance(size, tuple) else (size, size)


def _asked(config: ExtractConfig, dataset: Dataset) -> str:
    """Data set and model as options of a command line, for hints."""
    size = None if config.image_size_px is None else "x".join(map(str, dict.fromkeys(_pair(config.image_size_px))))
    options = {
        "--dataset": config.dataset,
        "--model": config.model or dataset.info.model,
        "--dataset-name": config.dataset_name,
        "--data-root": None if config.data_root is None else str(config.data_root),
        "--image-size": size,
    }
    return shlex.join([word for option, value in options.items() if value is not None for word in (option, value)])


def _open_if_there(url: str) -> Store | None:
    try:
        return featstore.store.open(url)
    except NotFoundError:
        return None


def _check_captions(
    config: ExtractConfig, dataset: Dataset, wanted: Sequence[int], steerings: Sequence[Steering]
) -> None:
    """Make sure that a caption file that is given is used, and has a text for every image that is wanted."""
    file = config.steering.captions
    if file is None:
        return
    captions = next((steering.captions for steering in steerings if steering.captions is not None), None)
    if captions is None:
        raise BadRequestError(
            f"--captions {file} is given, but no pass of {config.techniques!r} takes its texts",
            hint="the technique that does is prompt:caption",
        )
    root = "" if config.data_root is None else f" --data-root {shlex.quote(str(config.data_root))}"
    out = shlex.quote(str(file))
    remedy = f"featstore caption --dataset {shlex.quote(config.dataset)}{root} --captioner PATH_OR_ID --out {out}"
    keys = [sample.key for sample in dataset.samples]
    captions.check(keys, [keys[index] for index in wanted], remedy=remedy)


def _layers(
    source: ModelSource, config: ExtractConfig, size: tuple[int, int], found: Sequence[Run | None]
) -> tuple[dict[str, tuple[int, int, int]], dict[str, tuple[int, int, int]]]:
    """Shapes of the layers asked for, as they are stored and as the model has them.

    From the store where it knows them all, without building the model; the second is then empty.
    """
    text = config.layers or source.default_layers
    names = source.expand_layers(text)
    knowing = [run for run in found if run is not None and all(name in run.layers for name in names)]
    if knowing and (config.reduce is None or len(knowing) == len(found)):
        return {name: knowing[0].layers[name].shape for name in names}, {}
    whole = source.resolve_layers(text, *size, config.steering.prompt_chunks)
    reduced = {} if config.reduce is None else reduced_shapes(whole, components_of(config.reduce))
    return whole | reduced, whole


def _check_space(url: str, needed_bytes: int) -> None:
    if "://" not in url or url.startswith("file://"):
        hint = "fewer --layers or --limit make it smaller, --store names another place"
        require_space(local_path(url), needed_bytes, what="features", hint=hint)

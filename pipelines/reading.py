"""What head and picture pipelines read from a store: buckets, and errors that say what to run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import featstore.datasets
import featstore.models
import featstore.store
import featstore.techniques
from featstore.datasets import Dataset
from featstore.errors import BadRequestError, FeatstoreError, NotCommittedError, NotFoundError, unknown_name
from featstore.heads.features import RunRef
from featstore.store import Run, StoredDataset
from featstore.store.cached import DEFAULT_BYTES, CachedObjects, CacheUse

if TYPE_CHECKING:
    from featstore.heads import Features

ATTENTION_PREFIX = "attn-"
_DEFAULT_PRECISION = "float16"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BesideConfig:
    """Runs whose layers are concatenated after the amalgamation: attention maps, another model's features."""

    techniques: str
    """Technique expression; each of its runs is concatenated."""
    model: str | None = None
    """Name or folder of the model; None: the bucket's."""
    timesteps: tuple[int, ...] | None = None
    """One run a technique and timestep; None: the bucket's."""
    layers: str | None = None
    """Presets and layer names, comma separated; None: all aggregated attention layers."""
    fingerprints: tuple[str, ...] = ()
    """First digits of the fingerprints of runs that have to be told apart from others that fit."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BucketConfig:
    """Which runs of which data set are read."""

    dataset: str
    """Name of a known data set, or ``folder:PATH``."""
    techniques: str
    """Technique expression as it was extracted."""
    store: str = "features.zarr"
    """URL of the store."""
    model: str | None = None
    """Name or folder of the model; None: the only one there is."""
    timesteps: tuple[int, ...] = (50,)
    """One run a technique and timestep."""
    layers: str | None = None
    """Presets and layer names, comma separated; None: all that the runs have in common."""
    data_root: Path | None = None
    """Where data sets lie."""
    dataset_name: str | None = None
    """Name of the data set in the store; None: the data set's own."""
    fingerprints: tuple[str, ...] = ()
    """First digits of the fingerprints of runs that have to be told apart from others that fit."""
    beside: tuple[BesideConfig, ...] | None = None
    """What is concatenated after the amalgamation; None: the attention layers of the most steered run."""
    cache: Path | None = None
    """Folder of a cache through which a remote store is read."""
    cache_bytes: int = DEFAULT_BYTES
    """Bytes that the cache never exceeds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpenBeside:
    """Layers of one run that are concatenated after the amalgamation."""

    title: str
    """What people see for the run."""
    run: Run
    layers: tuple[str, ...]
    model: str | None = None
    """Name or folder of the model that was asked for; None: the bucket's."""

    def config(self) -> BesideConfig:
        """What finds this run, and no other, again."""
        return BesideConfig(
            techniques=self.run.recipe.technique,
            model=self.model,
            timesteps=(self.run.recipe.timestep,),
            layers=",".join(self.layers),
            fingerprints=(self.run.fingerprint,),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OpenBucket:
    """The runs that a head or a picture is made from."""

    dataset: Dataset
    stored: StoredDataset
    runs: tuple[Run, ...]
    """Technique by technique, timestep by timestep."""
    titles: tuple[str, ...]
    """What people see for each run: the technique, and the timestep where there are several."""
    maps: tuple[str, ...]
    """Names of the convolutional layers, in the order of the run."""
    beside: tuple[OpenBeside, ...]
    """What is concatenated after the amalgamation."""
    classes: tuple[str, ...]
    """Class names in label order; those of the data set."""

    def features(self, chosen: np.ndarray) -> Features:
        """The lazy features of all images, of which ``chosen`` (N,) bool are read; see `Run.lazy`."""
        from featstore.heads import Beside, Features

        refs, beside_refs = self.refs()
        return Features(
            maps=[{name: run.lazy(name, chosen) for name in self.maps} for run in self.runs],
            runs=refs,
            beside=[
                Beside(run=ref, layers={name: one.run.lazy(name, chosen) for name in one.layers})
                for ref, one in zip(beside_refs, self.beside, strict=True)
            ],
        )

    def refs(self) -> tuple[list[RunRef], list[RunRef]]:
        """How a head names the runs of the bucket, and those beside it."""
        return (
            [RunRef(name=name, fingerprint=run.fingerprint) for name, run in zip(self.titles, self.runs, strict=True)],
            [RunRef(name=one.title, fingerprint=one.run.fingerprint) for one in self.beside],
        )

    @property
    def cache_use(self) -> CacheUse | None:
        """What reading through a cache took from it so far; None without one."""
        objects = self.stored.objects
        return objects.use if isinstance(objects, CachedObjects) else None

    def complete(self) -> np.ndarray:
        """Mask (N,) over the store's rows: True where every run has every layer of today's image."""
        read = [(run, list(self.maps)) for run in self.runs] + [(one.run, list(one.layers)) for one in self.beside]
        whole: np.ndarray = np.logical_and.reduce([run.valid(layers) for run, layers in read])
        # The store's table says what the images were at the last extraction; they may have changed since.
        then, rows = self.stored.samples.digests, self.stored.row_of
        today = np.zeros(len(then), dtype=bool)
        for sample in self.dataset.samples:
            if sample.key in rows:
                today[rows[sample.key]] = then[rows[sample.key]] == sample.digest
        return whole & today

    def missing(self, keys: Sequence[str]) -> list[str]:
        """Those of ``keys`` without features of today's image."""
        rows, there = self.stored.row_of, self.complete()
        return [key for key in keys if key not in rows or not there[rows[key]]]

    def require(self, keys: Sequence[str], config: BucketConfig) -> np.ndarray:
        """Rows (len(keys),) of ``keys`` in the store, all of them with features of today's images.

        Raises:
            NotCommittedError: if some are missing, with the command that makes them.
        """
        if missing := self.missing(keys):
            raise NotCommittedError(
                f"features of {len(missing)} of {len(keys)} images are missing or stale, e.g. of {missing[0]!r}",
                hint=f"run: {self.extract_command(config)}",
            )
        return np.array([self.stored.row_of[key] for key in keys], dtype=int)

    def extract_command(self, config: BucketConfig) -> str:
        """The command that completes the runs, with what they were made with where that is no default."""
        info, recipe = self.dataset.info, self.runs[0].recipe
        prompts = {run.recipe.parameters.get("prompt") for run in self.runs if "prompt" in _parts(run)}
        own = [prompt for prompt in prompts if prompt is not None and prompt != info.prompt]
        size, default = (recipe.height_px, recipe.width_px), (info.image_size_px,) * 2
        options = {
            "--prompt": own[0] if len(own) == 1 else None,
            "--image-size": None if size == default else "x".join(str(side) for side in dict.fromkeys(size)),
            "--denoise-from": None if recipe.denoise_from is None else str(recipe.denoise_from),
            "--noise-ensemble": str(recipe.noise_ensemble) if recipe.noise_ensemble > 1 else None,
            "--precision": recipe.precision if recipe.precision != _DEFAULT_PRECISION else None,
            "--reduce": f"pca:{recipe.components}" if recipe.components else None,
            "--seed": str(recipe.seed) if recipe.seed else None,
        }
        return extract_command(config, **options)


def _parts(run: Run) -> list[str]:
    return run.recipe.technique.split("+")


def extract_command(config: BucketConfig, **more: str | None) -> str:
    """The command that extracts what ``config`` reads, with ``more`` options where their value is not None."""
    options = {
        "--dataset": config.dataset,
        "--techniques": config.techniques,
        "--timesteps": ",".join(map(str, config.timesteps)) if config.timesteps != (50,) else None,
        "--model": config.model,
        "--layers": config.layers,
        "--data-root": None if config.data_root is None else str(config.data_root),
        "--dataset-name": config.dataset_name,
        "--store": config.store,
    }
    words = [word for option, value in (options | more).items() if value is not None for word in (option, value)]
    return shlex.join(["featstore", "extract", *words])


def model_name(model: str) -> str:
    """What a model is called in a store, given its name or its folder, which need not be there any more."""
    return featstore.models.public_name(model)


def open_bucket(config: BucketConfig) -> OpenBucket:
    """Find the runs of ``config`` in its store; no model is loaded, no weights are looked for.

    Raises:
        BadRequestError: for unknown names.
        NotCommittedError: if a run is not there, with the command that extracts it.
    """
    techniques = featstore.techniques.parse(config.techniques)
    dataset = featstore.datasets.resolve(config.dataset, data_root=config.data_root)
    hint = f"run: {extract_command(config)}"
    try:
        store = featstore.store.open(config.store, cache=config.cache, cache_bytes=config.cache_bytes)
        stored = store.dataset(config.dataset_name or dataset.info.name)
        runs = stored.bucket(
            [technique.expression for technique in techniques],
            timesteps=config.timesteps,
            model=None if config.model is None else model_name(config.model),
            fingerprints=config.fingerprints,
        ).runs
    except NotFoundError as error:
        raise NotCommittedError(str(error), hint=hint) from error
    names = _layer_names(runs, config)
    attention = tuple(name for name in names if name.startswith(ATTENTION_PREFIX))
    titles = tuple(_title(run, several=len(config.timesteps) > 1) for run in runs)
    if config.beside is not None:
        beside = tuple(one for asked in config.beside for one in _open_beside(stored, asked, config))
    elif attention:
        parts = [run.recipe.technique.count("+") for run in runs]
        most_steered = parts.index(max(parts))
        beside = (OpenBeside(title=titles[most_steered], run=runs[most_steered], layers=attention),)
    else:
        beside = ()
    return OpenBucket(
        dataset=dataset,
        stored=stored,
        runs=runs,
        titles=titles,
        maps=tuple(name for name in names if not name.startswith(ATTENTION_PREFIX)),
        beside=beside,
        classes=dataset.info.classes,
    )


def _title(run: Run, *, several: bool) -> str:
    return run.recipe.technique + (f" t{run.recipe.timestep}" if several else "")


def _open_beside(stored: StoredDataset, asked: BesideConfig, config: BucketConfig) -> list[OpenBeside]:
    """The runs of ``asked`` in the data set ``stored``.

    Raises:
        NotCommittedError: if a run or layer is not there, with the command that extracts it.
    """
    timesteps = asked.timesteps or config.timesteps
    as_bucket = dataclasses.replace(
        config,
        techniques=asked.techniques,
        model=asked.model or config.model,
        timesteps=timesteps,
        layers=asked.layers,
        beside=(),
    )
    try:
        runs = stored.bucket(
            [technique.expression for technique in featstore.techniques.parse(asked.techniques)],
            timesteps=timesteps,
            model=None if as_bucket.model is None else model_name(as_bucket.model),
            fingerprints=asked.fingerprints,
        ).runs
    except NotFoundError as error:
        raise NotCommittedError(str(error), hint=f"run: {extract_command(as_bucket)}") from error
    found = []
    for run in runs:
        attention = [name for name in run.layers if name.startswith(ATTENTION_PREFIX)]
        names = attention
        if asked.layers is not None:
            names = expand_names(asked.layers, run.layers, as_bucket.model or run.recipe.model)
        if missing := [name for name in names if name not in run.layers]:
            reason = unknown_name("layer", missing[0], run.layers)
            raise NotCommittedError(f"not in run {run.path}: {reason}", hint=f"run: {extract_command(as_bucket)}")
        if not names:
            raise NotCommittedError(
                f"run {run.path} has no attention layers",
                hint="extract it with --layers attn-up-cross-2, or name others",
            )
        recipe = run.recipe
        own = [f"t{recipe.timestep}"] if len(timesteps) > 1 or asked.timesteps else []
        own += [f"from {recipe.denoise_from}"] if recipe.denoise_from is not None else []
        own = [recipe.model, *own] if asked.model else own
        title = " ".join([recipe.technique, *own])
        found.append(OpenBeside(title=title, run=run, layers=tuple(names), model=asked.model))
    return found


def _layer_names(runs: Sequence[Run], config: BucketConfig) -> list[str]:
    """Names of the layers asked for; all that the runs have in common if none are."""
    first, *others = runs
    common = [name for name in first.layers if all(name in run.layers for run in others)]
    names = common if config.layers is None else expand_names(config.layers, common, config.model or first.recipe.model)
    hint = f"run: {extract_command(config)}"
    for name in names:
        if name not in common:
            error = unknown_name("layer", name, common)
            raise NotCommittedError(f"not in every run asked for: {error}", hint=hint)
    if not any(not name.startswith(ATTENTION_PREFIX) for name in names):
        what = "the runs have in common" if config.layers is None else f"of {config.layers!r}"
        raise BadRequestError(f"no layer {what} is a convolutional one, which is needed beside attention", hint=hint)
    return names


def expand_names(text: str, known: Iterable[str], model: str) -> list[str]:
    """The names of a comma list of layers and presets; presets need the model's configuration at hand."""
    names = [name.strip() for name in text.split(",")]
    if all(name in set(known) for name in names):
        return list(dict.fromkeys(names))
    try:
        presets = featstore.models.describe(model).presets
    except FeatstoreError:
        presets = {}
    return list(dict.fromkeys(one for name in names for one in presets.get(name, (name,))))

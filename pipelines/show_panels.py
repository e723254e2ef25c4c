"""What pictures of stored features are put together from: columns, each of one run, one picture an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from featstore import content_shift, models, pictures
from featstore.errors import FeatstoreError, NotCommittedError
from featstore.pictures.pca import layer_size
from featstore.pipelines.reading import ATTENTION_PREFIX, BucketConfig, OpenBucket
from featstore.store import Run

_SHOWN_TOKENS = 3
_FIT_IMAGES = 32
_CHUNK_BYTES = 64 << 20
_FILLERS = frozenset({"a", "an", "the", "of", "in", "with", ","})
_SMALLEST_SIDE_PX = 256


def pca_of_runs(bucket: OpenBucket, rows: np.ndarray, *, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """`pca_pictures` of the runs of a bucket, by their titles."""
    runs = dict(zip(bucket.titles, bucket.runs, strict=True))
    return pca_pictures(runs, bucket.maps, rows, further=spread(np.flatnonzero(bucket.complete()), rows), seed=seed)


def spread(complete: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A few of the rows ``complete`` beside ``rows``, spread over the data set."""
    others = np.setdiff1d(complete, rows)
    count = min(_FIT_IMAGES, len(others))
    return others[np.linspace(0, len(others) - 1, count).astype(int)] if count else others[:0]


def pca_pictures(
    runs: Mapping[str, Run], layers: Sequence[str], rows: np.ndarray, *, further: np.ndarray, seed: int = 0
) -> dict[str, list[np.ndarray]]:
    """PCA pictures uint8 (H, W, 3) by the name of a run, one a row, with ONE basis for all runs.

    The basis is fitted on ``further`` images beside those shown: else one odd image among four takes all
    the colours. Maps are read a few images at a time, whatever the number of runs and images.

    Args:
        runs: by the name that people see.
        layers: layers that all runs have; they are stacked.
        rows: images that are shown.
        further: images that the basis is fitted on besides.
        seed: of the positions that it is fitted on.
    """
    fitted = fit_runs(list(runs.values()), layers, np.concatenate([rows, further]), seed=seed)
    return {title: [fitted.picture(run, row) for row in rows.tolist()] for title, run in runs.items()}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RunsBasis:
    """What makes colours of the stacked layers of several runs."""

    layers: tuple[str, ...]
    sizes: Mapping[str, float]
    """What each layer is divided by: the same for all runs, so that equal features have equal colours."""
    basis: pictures.PcaBasis

    def picture(self, run: Run, row: int) -> np.ndarray:
        """An image's features as uint8 (H, W, 3)."""
        stack = pictures.stack_layers({name: run.numpy(name, [row]) for name in self.layers}, self.sizes)
        made: np.ndarray = pictures.pca_pictures(self.basis, stack)[0]
        return made


def fit_runs(runs: Sequence[Run], layers: Sequence[str], rows: np.ndarray, *, seed: int = 0) -> RunsBasis:
    """One basis for ``rows`` of all ``runs``, which are read a few images at a time."""
    shapes = [runs[0].layers[name].shape for name in layers]
    stack_bytes = 4 * sum(s[0] for s in shapes) * max(s[1] for s in shapes) * max(s[2] for s in shapes)
    at_once = max(1, _CHUNK_BYTES // stack_bytes)
    chunks = np.array_split(rows, -(-len(rows) // at_once))
    sizes = {
        name: float(np.sqrt(np.mean([layer_size(run.numpy(name, rows[:at_once])) ** 2 for run in runs])))
        for name in layers
    }
    fit = pictures.BasisFit(parts=len(chunks) * len(runs), seed=seed)
    for run in runs:
        for chunk in chunks:
            fit.add(pictures.stack_layers({name: run.numpy(name, chunk) for name in layers}, sizes))
    return RunsBasis(layers=tuple(layers), sizes=sizes, basis=fit.basis())


def attention_panels(
    bucket: OpenBucket, rows: np.ndarray, images: list[np.ndarray], *, tokens: int | None = _SHOWN_TOKENS
) -> list[pictures.Panel]:
    """Attention of a few of the prompt's tokens, from the run that heads take attention from.

    Args:
        bucket: the runs.
        rows: images that are shown.
        images: the same, uint8 (H, W, 3).
        tokens: how many tokens; None: all that the prompt has.
    """
    if not bucket.beside:
        return []
    run, layers = bucket.beside[0].run, bucket.beside[0].layers
    return run_attention("attention", run, layers, rows, images, tokens)


def every_attention(bucket: OpenBucket, rows: np.ndarray, images: list[np.ndarray]) -> list[pictures.Panel]:
    """Attention of each token of its prompt, run by run, of those runs that have attention layers."""
    panels = []
    for title, run in zip(bucket.titles, bucket.runs, strict=True):
        layers = [name for name in run.layers if name.startswith(ATTENTION_PREFIX)]
        panels += run_attention(title, run, layers, rows, images, None) if layers else []
    return panels


def run_attention(
    title: str, run: Run, layers: Sequence[str], rows: np.ndarray, images: list[np.ndarray], count: int | None
) -> list[pictures.Panel]:
    """A column a token, of the largest of ``layers``."""
    layer = max(layers, key=lambda name: run.layers[name].shape[1])
    maps = run.numpy(layer, rows).astype(np.float32)
    recipe = run.recipe
    words = _tokens(recipe.model, recipe.parameters.get("prompt"), recipe.parameters.get("prompt_chunks", 1), count)
    return [
        pictures.Panel(
            title=f"{title}: {word}",
            pictures=tuple(
                pictures.attention_overlay(image, one[token]) for image, one in zip(images, maps, strict=True)
            ),
        )
        for token, word in words
        if token < maps.shape[1]
    ]


def _tokens(model: str, prompt: str | None, prompt_chunks: int, count: int | None) -> list[tuple[int, str]]:
    """Positions and words of telling tokens, or all; without the tokenizer at hand, the first positions."""
    unnamed = [(position, f"token {position}") for position in range(1, _SHOWN_TOKENS + 1)]
    if not prompt:
        return unnamed
    try:
        words = models.describe(model).tokens(prompt, prompt_chunks)
    except FeatstoreError:  # the weights are not on this machine; the features are, and that is enough
        return unnamed
    if count is None:
        return [(position, word) for position, word in enumerate(words) if any(map(str.isalnum, word or ""))] or unnamed
    telling = [(position, word) for position, word in enumerate(words) if word and word not in _FILLERS]
    return telling[:count] or unnamed


def shift_panels(
    bucket: OpenBucket, config: BucketConfig, rows: np.ndarray, images: list[np.ndarray]
) -> list[pictures.Panel]:
    """Content shift of each run to the unsteered features at t = 0, all on one scale; the mean is in the title.

    A layer's shift map is divided by the mean Laplacian length of its reference; layers are averaged. The outermost
    positions, where the Laplacian has no value, repeat those beside them.

    Raises:
        NotCommittedError: if there is no run of `basic` at t = 0, or it lacks images, with the command that makes them.
    """
    reference = _reference(bucket, config, rows)
    layers = [name for name in bucket.maps if min(reference.layers[name].shape[1:]) > 2] or list(bucket.maps)
    grid = (max(reference.layers[n].shape[1] for n in layers), max(reference.layers[n].shape[2] for n in layers))
    values = {}
    for title, run in zip(bucket.titles, bucket.runs, strict=True):
        total = np.zeros((len(rows), *grid))
        for name in layers:
            still = reference.numpy(name, rows)
            scale = float(content_shift.laplacian_norm(still).mean()) or 1.0
            shift = content_shift.shift_map(still, run.numpy(name, rows)) / scale
            total += pictures.resize_maps(np.pad(shift, ((0, 0), (1, 1), (1, 1)), mode="edge"), *grid)
        values[title] = total / len(layers)
    high = float(np.percentile(np.concatenate([maps.ravel() for maps in values.values()]), 99.5))
    return [
        pictures.Panel(
            title=f"{title}: {maps.mean():.2f}",
            pictures=tuple(
                pictures.heat_picture(one, low=0, high=high, size=_enlarged(image))
                for one, image in zip(maps, images, strict=True)
            ),
        )
        for title, maps in values.items()
    ]


def _enlarged(image: np.ndarray) -> tuple[int, int]:
    """The image's size times the smallest whole factor that gives 256 px a side."""
    factor = max(1, -(-_SMALLEST_SIDE_PX // min(image.shape[:2])))
    return image.shape[0] * factor, image.shape[1] * factor


def _reference(bucket: OpenBucket, config: BucketConfig, rows: np.ndarray) -> Run:
    """The run of `basic` at t = 0 that is made as the bucket's first run in all else, with ``rows`` in it."""
    first = bucket.runs[0].recipe
    same = ("model", "weights_digest", "height_px", "width_px", "seed", "noise_ensemble", "components")
    asked = dataclasses.replace(config, techniques="basic", timesteps=(0,), fingerprints=())
    hint = f"run: {bucket.extract_command(asked)}"
    for run in bucket.stored.runs():
        recipe = run.recipe
        if recipe.technique != "basic" or recipe.timestep or recipe.denoise_from is not None:
            continue
        if any(getattr(recipe, name) != getattr(first, name) for name in same):
            continue
        if any(name not in run.layers for name in bucket.maps):
            continue
        if not run.valid(list(bucket.maps))[rows].all():
            raise NotCommittedError("features of 'basic' at t = 0 lack some of these images", hint=hint)
        return run
    raise NotCommittedError(
        "content shift is measured against 'basic' at t = 0, which the store does not have in these layers", hint=hint
    )

"""Pictures of stored features: PCA to RGB with one basis for all runs, and attention maps by token."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from featstore import models, pictures
from featstore.errors import FeatstoreError, unknown_name
from featstore.pipelines.reading import BucketConfig, OpenBucket, open_bucket

_SHOWN_TOKENS = 3
_FIT_IMAGES = 32
_FIT_BYTES = 1 << 30
_FILLERS = frozenset({"a", "an", "the", "of", "in", "with", ","})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShowConfig:
    """What to make pictures of."""

    bucket: BucketConfig
    """The runs."""
    keys: tuple[str, ...] = ()
    """Images; empty: the first ``count`` that all runs have."""
    count: int = 4
    """How many images, where no keys are given."""
    out: Path = Path("features.png")
    """The PNG file to write."""
    seed: int = 0
    """Seed of the positions that the PCA is fitted on."""


def show(config: ShowConfig) -> Path:
    """Write one picture: a row an image, columns input, labels, PCA of each run, attention of a few tokens.

    Raises:
        BadRequestError: for an unknown key.
        NotCommittedError: if features are missing, with the command that makes them.
    """
    bucket = open_bucket(config.bucket)
    known = [sample.key for sample in bucket.dataset.samples]
    for key in config.keys:
        if key not in known:
            raise unknown_name("image", key, known)
    keys = list(config.keys) or _first_complete(bucket, known, config.count)
    rows = bucket.require(keys or known[:1], config.bucket)
    images = [bucket.dataset.image(key) for key in keys]
    truth = [bucket.dataset.mask(key) for key in keys]
    panels = pictures.segmentation_panels(
        images, truth, features=pca_of_runs(bucket, rows, seed=config.seed), predictions={}
    )
    panels += attention_panels(bucket, rows, images)
    shown = [mask for mask in truth if mask is not None]
    legend = pictures.legend(bucket.dataset.info.classes, shown) if shown and bucket.dataset.info.classes else ()
    first = bucket.runs[0].recipe
    title = f"{bucket.stored.name}, {first.model}, t = {', '.join(map(str, config.bucket.timesteps))}"
    return pictures.save_grid(config.out, panels, row_titles=keys, title=title, legend=legend)


def pca_of_runs(bucket: OpenBucket, rows: np.ndarray, *, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """PCA pictures uint8 (H, W, 3) by run title, one a row, with one basis across the runs.

    The basis is fitted on further images beside those shown, as many as memory allows: else one odd
    image among four takes all the colours.
    """
    fitted = np.concatenate([rows, _further_rows(bucket, rows)])
    stacks = {
        title: pictures.stack_layers({name: run.numpy(name, fitted) for name in bucket.maps})
        for title, run in zip(bucket.titles, bucket.runs, strict=True)
    }
    basis = pictures.fit_pca(list(stacks.values()), seed=seed)
    return {title: list(pictures.pca_pictures(basis, stack[: len(rows)])) for title, stack in stacks.items()}


def _further_rows(bucket: OpenBucket, rows: np.ndarray) -> np.ndarray:
    """Complete rows beside ``rows``, spread over the data set."""
    shapes = [bucket.runs[0].layers[name].shape for name in bucket.maps]
    channels, height, width = (sum(s[0] for s in shapes), max(s[1] for s in shapes), max(s[2] for s in shapes))
    room = _FIT_BYTES // (4 * channels * height * width * len(bucket.runs)) - len(rows)
    others = np.setdiff1d(np.flatnonzero(bucket.complete()), rows)
    count = max(0, min(room, _FIT_IMAGES, len(others)))
    return others[np.linspace(0, len(others) - 1, count).astype(int)] if count else others[:0]


def attention_panels(bucket: OpenBucket, rows: np.ndarray, images: list[np.ndarray]) -> list[pictures.Panel]:
    """Attention of a few of the prompt's tokens, from the run that heads take attention from."""
    if not bucket.beside:
        return []
    run, layers = bucket.beside[0].run, bucket.beside[0].layers
    layer = max(layers, key=lambda name: run.layers[name].shape[1])
    maps = run.numpy(layer, rows).astype(np.float32)
    return [
        pictures.Panel(
            title=f"attention: {word}",
            pictures=tuple(
                pictures.attention_overlay(image, one[token]) for image, one in zip(images, maps, strict=True)
            ),
        )
        for token, word in _tokens(
            run.recipe.model, run.recipe.parameters.get("prompt"), run.recipe.parameters.get("prompt_chunks", 1)
        )
    ]


def _tokens(model: str, prompt: str | None, prompt_chunks: int) -> list[tuple[int, str]]:
    """Positions and words of a few telling tokens; without the tokenizer at hand, the first positions."""
    unnamed = [(position, f"token {position}") for position in range(1, _SHOWN_TOKENS + 1)]
    if not prompt:
        return unnamed
    try:
        words = models.describe(model).tokens(prompt, prompt_chunks)
    except FeatstoreError:  # the weights are not on this machine; the features are, and that is enough
        return unnamed
    telling = [(position, word) for position, word in enumerate(words) if word and word not in _FILLERS]
    return telling[:_SHOWN_TOKENS] or unnamed


def _first_complete(bucket: OpenBucket, known: list[str], count: int) -> list[str]:
    missing = set(bucket.missing(known))
    return [key for key in known if key not in missing][:count]

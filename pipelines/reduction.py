"""``--reduce pca:N``: which images the projection is fitted on, and the fit when a run gets its layers.

The sample is the data set's first 64 images in its own order, whatever split or limit is asked for, so that it stays
the same when images are appended. Its digest is part of the recipe. A data set that had fewer images then goes on
with the run that it has: what is asked for is "reduced to N", and a basis never changes once features were made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from featstore.datasets import Dataset, UnreadableImageError
from featstore.errors import BadRequestError, IncompatibleError, unknown_name
from featstore.pipelines.progress import Progress
from featstore.recipe import Recipe, pca_of, sha256_hex
from featstore.store import Run, StoredDataset
from featstore.store.basis import Basis
from featstore.store.catalog import paths

if TYPE_CHECKING:
    import torch

    from featstore.extraction.reduce import Projection
    from featstore.models.backbones.base import Backbone
    from featstore.pipelines.plan import PlannedRun

SAMPLE_IMAGES = 64
SAMPLE_VECTORS = 1 << 14
"""Pixel vectors a layer at most: 256 of each of 64 maps."""
ATTENTION_PREFIX = "attn-"
_CHUNK_BYTES = 1 << 30
"""Maps, whole and in float32, that are held at once while fitting."""
_THREADS = 4

Shape = tuple[int, int, int]


def components_of(text: str) -> int:
    """N of ``pca:N``.

    Raises:
        BadRequestError: if it is something else.
    """
    method, _, number = text.partition(":")
    if method != "pca":
        raise unknown_name("reduction", method, ["pca"], hint="as in --reduce pca:32")
    if not number.isascii() or not number.isdigit() or int(number) < 1:
        raise BadRequestError(f"--reduce {text!r} names no number of components", hint="as in --reduce pca:32")
    return int(number)


def reduced_shapes(layers: Mapping[str, Shape], components: int) -> dict[str, Shape]:
    """Shapes (N, H, W) of those layers that a reduction to N components reduces.

    Layers of N channels or less stay as they are, and so do attention layers, whose channels are tokens.
    """
    return {
        name: (components, *shape[1:])
        for name, shape in layers.items()
        if shape[0] > components and not name.startswith(ATTENTION_PREFIX)
    }


def reduction_of(dataset: Dataset, components: int) -> dict[str, object]:
    """What the recipe of a new run says."""
    return pca_of(components, _digest(dataset, min(SAMPLE_IMAGES, len(dataset.samples))))


def continued(stored: StoredDataset, recipe: Recipe) -> Recipe:
    """``recipe``, or that of a run in the store which differs from it only in the sample that it was fitted on.

    Raises:
        CorruptError: if the document of a run that it could be is damaged.
    """
    if recipe.reduce is None or stored.find(recipe) is not None:
        return recipe
    before, _, after = f"{stored.name}/{recipe.path}".rpartition(recipe.family_digest)
    for path in paths(stored.objects, stored.name):
        if not (path.startswith(before) and path.endswith(after)):
            continue
        try:
            other = stored.open_run(path).recipe
        except IncompatibleError:  # of another version: not a run of this recipe
            continue
        if other.components == recipe.components and other == dataclasses.replace(recipe, reduce=other.reduce):
            return other
    return recipe


def sample_of(dataset: Dataset, recipe: Recipe) -> range:
    """Indices of the images that the reduction of ``recipe`` is fitted on.

    Raises:
        IncompatibleError: if the data set no longer has them all as they were.
    """
    wanted = (recipe.reduce or {})["sample"]
    for count in range(min(SAMPLE_IMAGES, len(dataset.samples)), 0, -1):
        if _digest(dataset, count) == wanted:
            return range(count)
    raise IncompatibleError(
        f"the run of {recipe.technique!r} was reduced after a sample of images that are no longer there as they were, "
        "so no layer can be added to it",
        hint="ask for the layers that it has, for another number of components, or for another --store",
    )


def _digest(dataset: Dataset, count: int) -> str:
    return sha256_hex("".join(sample.digest for sample in dataset.samples[:count]).encode())


def fit(
    dataset: Dataset, planned: PlannedRun, model: Backbone, batch_size: int, progress: Progress
) -> dict[str, Basis]:
    """The bases of those layers of a run that have none yet, from passes over the sample's images.

    An image that cannot be read, or whose maps are not finite, is left out.

    Args:
        dataset: where the sample comes from.
        planned: the run.
        model: its model, loaded.
        batch_size: rows of every forward pass of the run.
        progress: told of every image.

    Raises:
        BadRequestError: if none of the images can be used.
    """
    from featstore.extraction.forward import Extractor
    from featstore.extraction.reduce import Moments, some_pixels

    if not planned.to_fit:
        return {}
    recipe = planned.recipe
    size = (recipe.height_px, recipe.width_px)
    extractor = Extractor(
        model,
        [planned.steering],
        list(planned.to_fit),
        batch_size=batch_size,
        height_px=size[0],
        width_px=size[1],
        precision="float32",
    )
    sample = sample_of(dataset, recipe)
    vectors = SAMPLE_VECTORS // len(sample)
    image_bytes = sum(4 * math.prod(shape) for shape in planned.to_fit.values())
    chunk = max(1, min(batch_size, _CHUNK_BYTES // image_bytes))
    moments: dict[str, Moments] = {}
    reason = ""
    for indices, pixels, unreadable in _images(dataset, sample, chunk, size):
        reason = next(iter(unreadable), reason)
        samples = [dataset.samples[index] for index in indices]
        progress.advance(len(samples) + len(unreadable))
        if not samples:
            continue
        maps, bad = extractor.run(
            0,
            extractor.encode(pixels),
            pixels,
            [one.digest for one in samples],
            recipe.timestep,
            recipe.seed,
            planned.captions(dataset, [one.key for one in samples]),
            denoise_from=recipe.denoise_from,
            noise_ensemble=recipe.noise_ensemble,
        )
        reason = next(iter(bad.values()), reason)
        for row, one in enumerate(samples):
            for layer in maps if row not in bad else ():
                values = np.asarray(maps[layer])[row]
                moments.setdefault(layer, Moments(len(values))).add(
                    some_pixels(values, one.digest, layer, recipe.seed, vectors)
                )
    if not moments:
        raise BadRequestError(
            f"none of the {len(sample)} images that --reduce is fitted on can be used: {reason}",
            hint="the data set's first images must be sound, or leave out --reduce",
        )
    return {layer: one.basis(recipe.components) for layer, one in moments.items()}


def _images(
    dataset: Dataset, sample: Sequence[int], chunk: int, size: tuple[int, int]
) -> Iterator[tuple[list[int], np.ndarray, list[str]]]:
    """The sample's images in chunks: indices (n,), uint8 (n, height, width, 3), and why others could not be read."""
    from featstore.extraction.images import prepare

    def read(index: int) -> np.ndarray | str:
        try:
            return prepare(dataset.image(dataset.samples[index].key), *size)
        except UnreadableImageError as error:
            return str(error)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="featstore-sample") as pool:
        for start in range(0, len(sample), chunk):
            indices = sample[start : start + chunk]
            images = list(pool.map(read, indices))
            good = [(index, image) for index, image in zip(indices, images, strict=True) if not isinstance(image, str)]
            pixels = np.stack([image for _, image in good]) if good else np.zeros((0, *size, 3), np.uint8)
            yield [index for index, _ in good], pixels, [image for image in images if isinstance(image, str)]


def projections(run: Run, layers: Sequence[str], device: torch.device) -> dict[str, Projection]:
    """What reduces each of ``layers`` that is reduced in ``run``, on ``device``; errors of `Run.basis`."""
    # Only where there is something to reduce: the import takes torch.
    from featstore.extraction.reduce import Projection

    bases = {layer: run.basis(layer) for layer in layers}
    return {layer: Projection(basis, device) for layer, basis in bases.items() if basis is not None}

"""What can be picked from a store, and what a picked view shows; no user interface here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

import featstore.datasets
from featstore.datasets import Dataset
from featstore.errors import FeatstoreError, NotFoundError, unknown_name
from featstore.pictures import Match, nearest
from featstore.pipelines.reading import ATTENTION_PREFIX
from featstore.pipelines.show_panels import RunsBasis, fit_runs, spread
from featstore.store import Run, Store, StoredDataset

UInt8Array = npt.NDArray[np.uint8]

_USUAL_TIMESTEP = 50
_COARSEST_SIDE = 8
MAX_KEYS = 2000
"""Keys that are offered of a data set; any other can be typed."""


class Shelf:
    """The data sets of a store that have features.

    Args:
        store: opened for reading.
        dataset: where the images of one data set are, e.g. ``folder:PATH``; known ones are found by their name.
        data_root: where data sets lie.

    Raises:
        BadRequestError: for a data set that the store does not have.
        NotFoundError: if the store has no features at all.
    """

    def __init__(self, store: Store, *, dataset: str | None = None, data_root: Path | None = None) -> None:
        self._store = store
        self._data_root = data_root
        self._given = None if dataset is None else featstore.datasets.resolve(dataset, data_root=data_root)
        names = [name for name in store.datasets() if _mapped(store.dataset(name))]
        if not names:
            raise NotFoundError(
                f"{store.url!r} has no features to browse",
                hint="featstore extract --dataset toyhorse --techniques basic",
            )
        if self._given is not None and self._given.info.name not in names:
            raise unknown_name("data set in the store", self._given.info.name, names)
        self._images = {name: self._at_hand(name) for name in names}
        first = None if self._given is None else self._given.info.name
        self.names = tuple(sorted(names, key=lambda name: (name != first, self._images[name] is None, name)))
        """Names of the data sets: the one that images were given for first, then those whose images are at hand."""

    def _at_hand(self, name: str) -> Dataset | None:
        if self._given is not None and self._given.info.name == name:
            return self._given
        try:
            return featstore.datasets.resolve(name, data_root=self._data_root)
        except FeatstoreError:  # its files are elsewhere: features are shown without their images
            return None

    def take(self, name: str) -> Book:
        """Open a data set as it is now."""
        return Book(self._store.dataset(name), self._images[name])


class Book:
    """One data set: its runs by technique and timestep, and views of two of its images."""

    def __init__(self, stored: StoredDataset, images: Dataset | None) -> None:
        self.stored = stored
        self._images = images
        self._digests = {} if images is None else {sample.key: sample.digest for sample in images.samples}
        self._bases: dict[tuple[tuple[str, ...], str], RunsBasis] = {}
        self._valid: dict[tuple[str, str], npt.NDArray[np.bool_]] = {}
        runs = _mapped(stored)
        names = [_name(run, several=len({one.recipe.model for one in runs}) > 1) for run in runs]
        places = [(name, run.recipe.timestep) for name, run in zip(names, runs, strict=True)]
        self.runs: Mapping[tuple[str, int], Run] = {
            (name if places.count((name, at)) == 1 else f"{name} ({run.fingerprint[:8]})", at): run
            for (name, at), run in zip(places, runs, strict=True)
        }
        """By what people see, and timestep."""

    @property
    def techniques(self) -> list[str]:
        """Names of the runs, timesteps aside."""
        return sorted({name for name, _ in self.runs})

    @property
    def timesteps(self) -> list[int]:
        """Those of all runs."""
        return sorted({timestep for _, timestep in self.runs})

    @property
    def usual_timestep(self) -> int:
        """The one that most techniques have; of several, the one nearest to what features are usually taken at."""
        there = [timestep for _, timestep in self.runs]
        return min(self.timesteps, key=lambda timestep: (-there.count(timestep), abs(timestep - _USUAL_TIMESTEP)))

    @property
    def has_images(self) -> bool:
        """Whether the images themselves are at hand."""
        return self._images is not None

    def usual_layer(self, runs: Mapping[str, Run]) -> str:
        """A layer that matches well: the one of most channels among those that are not too coarse; "" if none is."""
        names, shapes = self.layers(runs), _maps(next(iter(runs.values()))) if runs else {}
        fine = [name for name in names if name in shapes and min(shapes[name][1:]) >= _COARSEST_SIDE] or names
        return max(fine, key=lambda name: shapes.get(name, (0, 0, 0)), default="")

    def chosen(self, techniques: Sequence[str], timestep: int) -> dict[str, Run]:
        """The runs of ``techniques`` at ``timestep``, as far as there are any."""
        return {name: self.runs[name, timestep] for name in techniques if (name, timestep) in self.runs}

    def layers(self, runs: Mapping[str, Run]) -> list[str]:
        """Convolutional layers that all of ``runs`` have in one shape; all layers of the data set for none."""
        some = list(runs.values())
        if not some:
            return sorted({name for run in self.runs.values() for name in _maps(run)})
        shapes = [_maps(run) for run in some]
        return [name for name, shape in shapes[0].items() if all(one.get(name) == shape for one in shapes)]

    def keys(self) -> list[str]:
        """Keys to offer: all, or so many spread over a large data set."""
        keys = self.stored.samples.keys
        if len(keys) <= MAX_KEYS:
            return list(keys)
        return [keys[row] for row in np.linspace(0, len(keys) - 1, MAX_KEYS).astype(int)]

    def first_pair(self) -> tuple[str, str]:
        """Keys of the first two images that have features in the first run."""
        run = next(run for (_, timestep), run in self.runs.items() if timestep == self.usual_timestep)
        rows = np.flatnonzero(self._there(run, next(iter(_maps(run)))))
        keys = [self.stored.samples.keys[row] for row in rows[:2]] or list(self.stored.samples.keys[:1])
        return keys[0], keys[-1]

    def row(self, key: str) -> int:
        """Row of an image.

        Raises:
            BadRequestError: for an unknown key, with the nearest.
        """
        if key not in self.stored.row_of:
            raise unknown_name("image", key, self.keys())
        return self.stored.row_of[key]

    def picture(self, key: str) -> UInt8Array | None:
        """The image itself, uint8 (H, W, 3); None where it is not at hand, or is another one by now."""
        digest = self.stored.samples.digests[self.row(key)]
        if self._images is None or self._digests.get(key) != digest:
            return None
        try:
            return self._images.image(key)
        except FeatstoreError:
            return None

    def size(self, key: str, run: Run) -> tuple[int, int]:
        """(height, width) in pixels of what a click on the image refers to: the image's, or else the model's input."""
        image = self.picture(key)
        return (run.recipe.height_px, run.recipe.width_px) if image is None else (image.shape[0], image.shape[1])

    def view(self, runs: Mapping[str, Run], layer: str, keys: Sequence[str]) -> dict[str, list[UInt8Array | None]]:
        """PCA pictures of ``keys`` by run, with one basis for all; None where an image has no features.

        Raises:
            BadRequestError: for unknown keys or layers.
        """
        rows = [self.row(key) for key in keys]
        if layer not in self.layers(runs):
            raise unknown_name("layer", layer, self.layers(runs))
        there = {name: self._there(run, layer) for name, run in runs.items()}
        some = {name: run for name, run in runs.items() if there[name].any()}
        if not some:
            return {name: [None] * len(keys) for name in runs}
        basis = self._basis(some, layer, there)
        return {
            name: [basis.picture(run, row) if there[name][row] else None for row in rows] for name, run in runs.items()
        }

    def match(self, run: Run, layer: str, source: str, point: tuple[int, int], target: str) -> Match | None:
        """Where in image ``target`` the feature at ``point`` (y, x) of image ``source`` is; None without features.

        Raises:
            BadRequestError: for unknown keys, or a point outside the image.
        """
        rows = self.row(source), self.row(target)
        if not self._there(run, layer)[list(rows)].all():
            return None
        maps = run.numpy(layer, rows)
        return nearest(maps[0], point, self.size(source, run), maps[1], self.size(target, run))

    def _there(self, run: Run, layer: str) -> npt.NDArray[np.bool_]:
        if (run.path, layer) not in self._valid:
            self._valid[run.path, layer] = run.valid([layer])
        return self._valid[run.path, layer]

    def _basis(self, runs: Mapping[str, Run], layer: str, there: Mapping[str, npt.NDArray[np.bool_]]) -> RunsBasis:
        """Kept for each choice of runs and layer: colours stay as they are while images are picked."""
        known = tuple(run.path for run in runs.values()), layer
        if known not in self._bases:
            common = np.flatnonzero(np.logical_and.reduce([there[name] for name in runs]))
            if len(common):
                self._bases[known] = fit_runs(list(runs.values()), [layer], spread(common, common[:0]))
            else:  # no image is in all of them: the basis of the first has to do
                name, run = next(iter(runs.items()))
                self._bases[known] = fit_runs([run], [layer], spread(np.flatnonzero(there[name]), common))
        return self._bases[known]


def _mapped(stored: StoredDataset) -> list[Run]:
    """Runs with at least one convolutional layer."""
    return [run for run in stored.runs() if _maps(run)]


def _maps(run: Run) -> dict[str, tuple[int, int, int]]:
    return {name: info.shape for name, info in run.layers.items() if not name.startswith(ATTENTION_PREFIX)}


def _name(run: Run, *, several: bool) -> str:
    return f"{run.recipe.technique}, {run.recipe.model}" if several else run.recipe.technique

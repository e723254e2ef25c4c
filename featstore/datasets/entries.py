"""The list of known data sets: what they are called, where each looks for its files, how to get them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from featstore.datasets.base import Dataset
from featstore.registry import Registry

DATA_ROOT_VARIABLE = "FEATSTORE_DATA"
"""Environment variable that names the folder in which data sets are looked for."""


def resolve_data_root(data_root: Path | None = None) -> Path:
    """The folder in which data sets are looked for: the argument, else ``$FEATSTORE_DATA``, else ``./data``."""
    if data_root is not None:
        return Path(data_root)
    return Path(os.environ.get(DATA_ROOT_VARIABLE) or "data")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DatasetEntry:
    """One known data set, before anything of it is opened."""

    title: str
    """A few words for people."""
    how_to_get: str
    """What to do to have it, a sentence; for an embedded set, that nothing is needed."""
    opener: Callable[[Path | None], Dataset]
    """Opens it; gets the folder of ``where``. Raises NotFoundError if the files are absent."""
    folder: str | None = None
    """Its folder below the data root; None: it has no files of its own."""
    probe: str | tuple[str, ...] = "."
    """What exists below that folder if the set is there; of several, any."""

    def where(self, data_root: Path | None = None) -> Path | None:
        """The folder that it looks in, whether or not that exists; None: it needs none."""
        return None if self.folder is None else resolve_data_root(data_root) / self.folder

    def present(self, data_root: Path | None = None) -> bool:
        """Whether it can be opened, as far as a look at one path tells."""
        where = self.where(data_root)
        probes = (self.probe,) if isinstance(self.probe, str) else self.probe
        return where is None or any((where / probe).exists() for probe in probes)


DATASETS: Registry[DatasetEntry] = Registry("data set")
"""Every known data set by the name that people type; ``folder:PATH`` stands for any folder of images."""

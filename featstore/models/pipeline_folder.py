"""A pipeline folder (diffusers layout): its parts, their configurations and weights, and its digest. No torch."""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from featstore.errors import BadRequestError, NotFoundError
from featstore.models.digests import files_sha256
from featstore.models.files import WeightFiles, read_json, weight_files


class PipelineFolder(abc.ABC):
    """A pipeline folder on this machine, with the parts that a family of models has.

    Creating one reads configuration files only and refuses what is no folder of its family.

    Args:
        name: public name, part of recipes and store paths.
        folder: the pipeline folder, with ``model_index.json``.
        allow_pickle: whether weights may be pickles (``.bin``) where there are no safetensors.
        absent: set if the folder holds the configuration alone: layers and sizes are known, and this error, which
            says how to get the weights, is raised where they are needed.

    Raises:
        NotFoundError: if the folder or one of its configuration files is absent.
        BadRequestError: if it holds a model of another kind.
    """

    components: ClassVar[Mapping[str, tuple[str, ...]]]
    """Parts that ``model_index.json`` must list, each with the class names that are taken."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Those of them that a pipeline can do without."""
    weighted: ClassVar[Mapping[str, str]]
    """Parts that have weights, each with the stem of its weight files."""
    tokenizers: ClassVar[tuple[str, ...]]
    """Folders of tokenizers."""
    needed: ClassVar[Mapping[str, tuple[str, ...]]]
    """Keys that a part's ``config.json`` must have."""

    def __init__(
        self, name: str, folder: Path, *, allow_pickle: bool = False, absent: NotFoundError | None = None
    ) -> None:
        self.name = name
        self.folder = folder
        self.allow_pickle = allow_pickle
        self.absent = absent
        self.left_out: frozenset[str] = frozenset()
        """Optional parts that the pipeline does without."""
        self._check_components()
        self._read()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {str(self.folder)!r})"

    # configuration

    @abc.abstractmethod
    def _read(self) -> None:
        """Read the configuration files of the family and refuse what is not of it."""

    def _check_components(self) -> None:
        if not self.folder.is_dir():
            raise NotFoundError(f"model {self.name!r}: there is no folder {self.folder}")
        index = read_json(self.folder / "model_index.json", f"model {self.name!r}")
        for component, wanted in self.components.items():
            found = index.get(component)
            if component in self.optional and found in (None, [None, None]):
                self.left_out |= {component}
                continue
            kind = found[1] if isinstance(found, list) and len(found) == 2 else None
            if kind not in (*wanted, *(f"{name}Fast" for name in wanted)):
                raise BadRequestError(
                    f"model {self.name!r} in {self.folder} ({index.get('_class_name')}) has {kind} as its "
                    f"{component}; this version takes {' or '.join(wanted)} there"
                )

    def component_folder(self, component: str) -> Path:
        """Folder of a part's files: one of its own, or, as diffusers has it too, the pipeline's if that is absent."""
        own = self.folder / component
        flat = not own.is_dir() and len(self.weighted) == 1
        return self.folder if flat else own

    def _config(self, component: str) -> dict[str, Any]:
        path = self.component_folder(component) / "config.json"
        config = read_json(path, f"model {self.name!r}, {component}")
        missing = [key for key in self.needed.get(component, ()) if config.get(key) is None]
        if missing:
            raise BadRequestError(f"{path} does not say {', '.join(missing)}")
        return config

    # files

    @functools.cached_property
    def component_weights(self) -> Mapping[str, WeightFiles]:
        """The weight files of each component that has some.

        Raises:
            NotFoundError: if some are missing.
            BadRequestError: if they are pickles, which are not allowed.
        """
        if self.absent is not None:
            raise self.absent
        return {
            name: weight_files(self.component_folder(name), stem, allow_pickle=self.allow_pickle)
            for name, stem in self.weighted.items()
            if name not in self.left_out
        }

    @functools.cached_property
    def decisive_files(self) -> tuple[Path, ...]:
        """Every file that decides what the model computes: weights, configurations, tokenizers, schedule.

        Raises:
            NotFoundError: if one is missing.
            BadRequestError: if weights are pickles, which are not allowed.
        """
        files = [file for weights in self.component_weights.values() for file in weights.files]
        files += [self.component_folder(name) / "config.json" for name in self.component_weights]
        files.append(self.component_folder("scheduler") / "scheduler_config.json")
        for name in (name for name in self.tokenizers if name not in self.left_out):
            tokenizer = sorted(path for path in (self.folder / name).glob("*") if path.is_file())
            if not tokenizer:
                raise NotFoundError(f"model {self.name!r}: no tokenizer in {self.folder / name}")
            files += tokenizer
        for file in files:
            if not file.is_file():
                raise NotFoundError(f"model {self.name!r}: no {file.name} in {file.parent}")
        return tuple(files)

    @functools.cached_property
    def weights_digest(self) -> str:
        """SHA-256 over `decisive_files`: their paths in the folder and their content.

        Raises:
            NotFoundError: if a file is missing.
            BadRequestError: if weights are pickles, which are not allowed.
        """
        return files_sha256(self.folder, self.decisive_files)

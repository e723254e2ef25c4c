"""Where a part of a model (its pipeline, a ControlNet) is: a folder, the Hugging Face cache, or still on the Hub."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import ClassVar

from featstore.errors import FeatstoreError, NotFoundError
from featstore.models.families import open_folder
from featstore.models.files import DIFFUSERS_STEM, choose_weights, shards, weight_files
from featstore.models.hub import HubId, Remote, cache_folder, no_such_file
from featstore.models.weights_root import WEIGHTS_VARIABLE

_SMALL = (".json", ".txt", ".model")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part(abc.ABC):
    """One part, and the places that it may be in."""

    what: str
    """What it is, for messages."""
    folder: Path
    """Folder of its own on this machine; it need not be there."""
    hub: HubId
    """Its repository."""
    allow_pickle: bool = False
    """Whether its weights may be pickles."""
    known: tuple[str, ...] = ()
    """Ids that a wrong one may have been meant to be."""

    head: ClassVar[str]
    """The file that tells a folder of the kind."""
    include: ClassVar[tuple[str, ...]]
    """Patterns of the files that are needed, for people who fetch them by hand."""

    def local(self) -> Path | None:
        """The folder of its own, if it is there with anything in it."""
        return self.folder if self.folder.is_dir() and any(self.folder.iterdir()) else None

    def cached(self) -> Path | None:
        """Its folder in the Hugging Face cache, if that has all of it. Asks no network."""
        return self._cached()[0]

    def _cached(self) -> tuple[Path | None, str | None]:
        """The folder in the cache if it has all; else what is wrong with it."""
        snapshot = self.hub.snapshot(self.head)
        if snapshot is None:
            return None, None
        try:
            self._check_whole(snapshot)
        except FeatstoreError as error:
            return None, str(error)
        return snapshot, None

    def find(self) -> Path:
        """Its folder; fetched if it is nowhere on this machine.

        Raises:
            NotFoundError: if it cannot be fetched: wrong id or revision, no access, no network.
            BadRequestError: if it is of a kind that is not known, or has pickles only.
            StorageError: if fetching fails half way.
        """
        return self.local() or self.cached() or self._fetched()

    def configuration(self) -> Path:
        """Folder with its configuration at least, from the Hugging Face cache or fetched."""
        snapshot = self.hub.snapshot(self.head)
        if snapshot is not None:
            try:
                self._weighted(snapshot)
            except NotFoundError:
                pass
            else:
                return snapshot
        return self._small(self._remote())

    def absent(self) -> NotFoundError:
        """The error if it is nowhere on this machine."""
        problem = self._cached()[1]
        return NotFoundError(
            f"{self.what} is not on this machine: neither in {self.folder} nor, as {self.hub}, in the Hugging Face "
            f"cache {cache_folder()}{f' ({problem})' if problem else ''}",
            hint=f"where there is a network: `{self.hub.command(self.folder, self.include)}`; ${WEIGHTS_VARIABLE} "
            "names another place than ./weights",
        )

    @abc.abstractmethod
    def _weighted(self, snapshot: Path) -> Mapping[Path, str]:
        """Folders with weights, each with the stem of their files, once all small files are there."""

    @abc.abstractmethod
    def _check_whole(self, folder: Path) -> None:
        """Refuse a folder in which something is missing."""

    @abc.abstractmethod
    def _small_files(self, files: Collection[str]) -> list[str]:
        """Which of a repository's files are configuration and tokenizers."""

    def _remote(self) -> Remote:
        remote = Remote(self.hub, absent=self.absent(), known=self.known)
        if self.head not in remote.sizes_bytes:
            raise no_such_file(self.hub, self.head, remote.sizes_bytes)
        return remote

    def _small(self, remote: Remote) -> Path:
        return remote.fetch(self._small_files(remote.sizes_bytes))

    def _fetched(self) -> Path:
        remote = self._remote()
        snapshot = self._small(remote)
        wanted: list[str] = []
        for folder, stem in self._weighted(snapshot).items():
            inside = PurePosixPath(folder.relative_to(snapshot).as_posix())
            names = {PurePosixPath(file).name for file in remote.sizes_bytes if PurePosixPath(file).parent == inside}
            choice = choose_weights(names, f"{self.hub}, {inside}", stem, allow_pickle=self.allow_pickle)
            files = [path.name for path in shards(folder / choice.name)] if choice.index else [choice.name]
            for file in files:
                if file not in names:
                    raise NotFoundError(f"weights in {self.hub}, {inside}, are incomplete: {file} is missing")
            wanted += [str(inside / file) for file in files]
        remote.announce(wanted)
        snapshot = remote.fetch(wanted)
        self._check_whole(snapshot)
        return snapshot


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline(Part):
    """A pipeline of any family."""

    head: ClassVar = "model_index.json"
    include: ClassVar = ("*.json", "*.txt", "*.model", "*/*.safetensors")

    def _weighted(self, snapshot: Path) -> Mapping[Path, str]:
        source = open_folder(self.hub.name, snapshot, absent=self.absent())
        parts = {name: stem for name, stem in source.weighted.items() if name not in source.left_out}
        return {source.component_folder(name): stem for name, stem in parts.items()}

    def _check_whole(self, folder: Path) -> None:
        _ = open_folder(self.hub.name, folder, allow_pickle=self.allow_pickle).decisive_files

    def _small_files(self, files: Collection[str]) -> list[str]:
        return [file for file in files if file.count("/") <= 1 and PurePosixPath(file).suffix in _SMALL]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ControlNet(Part):
    """A ControlNet."""

    head: ClassVar = "config.json"
    include: ClassVar = ("config.json", "*.safetensors")

    def _weighted(self, snapshot: Path) -> Mapping[Path, str]:
        return {snapshot: DIFFUSERS_STEM}

    def _check_whole(self, folder: Path) -> None:
        weight_files(folder, DIFFUSERS_STEM, allow_pickle=self.allow_pickle)

    def _small_files(self, files: Collection[str]) -> list[str]:
        return [file for file in files if "/" not in file and PurePosixPath(file).suffix == ".json"]

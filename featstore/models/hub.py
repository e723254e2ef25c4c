"""Models of the Hugging Face Hub: their ids, what of them this machine has, and fetching what is needed. No torch.

What is here already is used without asking the network. What is not is fetched into the Hugging Face cache, small
files first and weights last, so that a copy with all of its weights is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import glob
import logging
import re
import shlex
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from featstore.errors import BadRequestError, FeatstoreError, NotFoundError, StorageError
from featstore.recipe import slug

logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")
_ID_CHARS = 96
_NOT_NEEDED = ("*.fp16.*", "*non_ema*", "safety_checker/*")
_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".pkl")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HubId:
    """A repository of the Hub at one revision."""

    repo: str
    """``owner/name``."""
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """The id in ``owner/name`` or ``owner/name@revision``; None if it is nothing of the kind."""
        repo, at, revision = text.partition("@")
        if not _ID.fullmatch(repo) or len(repo) > _ID_CHARS or "--" in repo or ".." in repo:
            return None
        if Path(repo).suffix in _FILES or (at and not revision):
            return None
        return cls(repo=repo, revision=revision or None)

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def name(self) -> str:
        """The id as a public name: a slug, without the revision, which the weights' digest tells apart."""
        return slug(self.repo).strip("._-")

    def snapshot(self, file: str) -> Path | None:
        """Folder in the Hugging Face cache that has this revision's ``file``, and perhaps more; asks no network."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, file, revision=self.revision)
        return Path(found).parents[file.count("/")] if isinstance(found, str) else None

    def command(self, folder: Path, include: Sequence[str]) -> str:
        """The command that fetches the repository's files of these patterns into a folder."""
        words = ["hf download", self.repo]
        if self.revision is not None:
            words.append(f"--revision {self.revision}")
        words += [f'--include "{pattern}"' for pattern in include]
        words += [f'--exclude "{pattern}"' for pattern in _NOT_NEEDED]
        return " ".join([*words, f"--local-dir {shlex.quote(str(folder))}"])


def cache_folder() -> Path:
    """The Hugging Face cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


class Remote:
    """A repository as the Hub has it now. Opening it is the first request.

    Args:
        hub: the id.
        absent: what is raised, with the reason appended, if the Hub cannot be reached.
        known: ids that the one asked for may have been meant to be.

    Raises:
        NotFoundError: if it is not there, not at that revision, not open to this user, or the Hub is out of reach.
        StorageError: if the Hub fails.
    """

    def __init__(self, hub: HubId, *, absent: NotFoundError, known: Collection[str] = ()) -> None:
        from huggingface_hub import HfApi

        self._hub, self._absent, self._known = hub, absent, known
        self._reached = False
        with self._errors():
            info = HfApi().model_info(hub.repo, revision=hub.revision, files_metadata=True)
        self.sizes_bytes: dict[str, int] = {one.rfilename: one.size or 0 for one in info.siblings or ()}
        """Size of every file, by its path in the repository."""
        self._reached = True

    def fetch(self, files: Collection[str]) -> Path:
        """Fetch these files, those excepted that are here already, and return the folder that they are in.

        Bars show the progress on standard error. What breaks off goes on from the last whole file.

        Raises:
            NotFoundError: if the repository is not open to this user.
            StorageError: if the network or the disk fails, or the disk is too small.
        """
        from huggingface_hub import snapshot_download

        self._check_space(files)
        with self._errors():
            patterns = [glob.escape(file) for file in sorted(files)]
            return Path(snapshot_download(self._hub.repo, revision=self._hub.revision, allow_patterns=patterns))

    def announce(self, files: Collection[str]) -> None:
        """Say what of these files is about to be fetched."""
        missing = self._missing(files)
        if missing:
            size_gb = sum(self.sizes_bytes[file] for file in missing) / 1e9
            logger.warning(
                "fetching %d weight files of %s, %.2f GB, into %s", len(missing), self._hub, size_gb, cache_folder()
            )

    def _check_space(self, files: Collection[str]) -> None:
        place = cache_folder().absolute()
        while not place.exists():
            place = place.parent
        needed_bytes = sum(self.sizes_bytes[file] for file in self._missing(files))
        free_bytes = shutil.disk_usage(place).free
        if needed_bytes > free_bytes:
            raise StorageError(
                f"{self._hub} takes {needed_bytes / 1e9:.2f} GB and {place} has {free_bytes / 1e9:.2f} GB free",
                hint="$HF_HUB_CACHE names another place",
            )

    def _missing(self, files: Collection[str]) -> list[str]:
        return [file for file in files if self._hub.snapshot(file) is None]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what huggingface_hub raises into what people can act on."""
        from huggingface_hub import errors

        hub = self._hub
        try:
            yield
        except FeatstoreError:
            raise
        except errors.GatedRepoError as error:
            raise NotFoundError(f"{hub} is gated on the Hub, and you are not let in", hint=_login(hub)) from error
        except errors.RevisionNotFoundError as error:
            raise NotFoundError(
                f"{hub.repo} has no revision {hub.revision!r} on the Hub", hint=self._revisions()
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise NotFoundError(f"the Hub has no model {hub.repo!r} that you may see", hint=self._near()) from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status in (401, 403):
                raise NotFoundError(f"the Hub does not give you {hub} (HTTP {status})", hint=_login(hub)) from error
            raise StorageError(
                f"the Hub failed to give {hub}: HTTP {status}", hint="the same command goes on from there"
            ) from error
        except Exception as error:
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
            if isinstance(error, errors.OfflineModeIsEnabled):
                reason = "$HF_HUB_OFFLINE is set"
            elif not isinstance(error, OSError) and not _of_the_network(error):
                raise
            if not self._reached:
                raise NotFoundError(
                    f"{self._absent}; the Hub cannot be reached ({reason})", hint=self._absent.hint
                ) from error
            raise StorageError(
                f"fetching {hub} broke off ({reason})", hint="the same command goes on from there"
            ) from error

    def _near(self) -> str:
        near = difflib.get_close_matches(self._hub.repo, self._known, n=1, cutoff=0.5)
        meant = f"did you mean {near[0]!r}? " if near else ""
        return f"{meant}A private one needs `hf auth login`; a local folder of that name is written ./{self._hub.repo}"

    def _revisions(self) -> str | None:
        from huggingface_hub import HfApi

        with contextlib.suppress(Exception):
            refs = HfApi().list_repo_refs(self._hub.repo)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
            return f"its branches and tags: {', '.join(names)}; a commit is given with its 40 digits"
        return None


def no_such_file(hub: HubId, file: str, sizes_bytes: Collection[str]) -> BadRequestError:
    """The error for a repository that has no ``file``, which every model of the kind wanted has."""
    single = any("/" not in name and Path(name).suffix in _FILES for name in sizes_bytes)
    return BadRequestError(
        f"{hub} has no {file} on the Hub: it is no repository in diffusers' layout",
        hint="it holds single files; look for a `-diffusers` twin of it" if single else None,
    )


def _login(hub: HubId) -> str:
    return f"ask for access on https://huggingface.co/{hub.repo}, then `hf auth login`"


def _of_the_network(error: Exception) -> bool:
    """Whether it comes from the HTTP client, which is not the same library in every version of huggingface_hub."""
    return any(kind.__name__ in ("TransportError", "RequestException") for kind in type(error).__mro__)

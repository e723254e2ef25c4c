"""What is listed of a model before it is asked for, and how it is found."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from featstore.errors import NotFoundError
from featstore.models.families import open_folder
from featstore.models.hub import HubId
from featstore.models.parts import ControlNet, Pipeline
from featstore.models.source import ModelSource, Place
from featstore.models.trained import has_weights
from featstore.models.weights_root import DEFAULT_ROOT, WEIGHTS_VARIABLE, asked_root
from featstore.registry import Registry

__all__ = ["CONFIGS", "MODELS", "WEIGHTS_VARIABLE", "ModelEntry"]

CONFIGS = Path(__file__).parent / "configs"
"""Configuration files of named models, ``<name>/model_index.json`` and so on: layers and sizes without any weights."""
_CONTROLNET = "controlnet-"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """One named model, or one repository of the Hub."""

    name: str
    """Public name."""
    title: str
    """A few words for people."""
    family: str
    """Architecture, e.g. "Stable Diffusion 1 UNet"."""
    hub: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Repositories of its parts on the Hugging Face Hub, as ``owner/name`` or ``owner/name@revision``.

    Parts are named as the folders are in which they are looked for on this machine: ``pipeline`` (every model of
    the Hub has it) and ``controlnet-<variant>``, one for each variant that technique ``controlnet`` offers.
    """
    subfolder: str | None = None
    """Folder of the weights below a weights root; None: the name."""
    default_folder: Path | None = None
    """Where the weights are looked for unless a weights root is given; None: below ``weights``."""
    how_to_get: str | None = None
    """How the weights come there; None: they are fetched from the Hub."""
    opener: Callable[[Path], ModelSource] | None = None
    """Makes the source from the folder of the weights, for a model that is not described by ``hub``."""

    def where(self, weights_root: Path | None = None) -> Path:
        """Folder in which the weights are looked for: below the root if there is one, else the model's own place."""
        root, below = asked_root(weights_root), self.subfolder or self.name
        own = self.default_folder or DEFAULT_ROOT / below
        if root is None or (has_weights(own) and not has_weights(root / below)):
            return own
        return root / below

    def there(self, weights_root: Path | None = None) -> str | None:
        """How the pipeline is on this machine: in a ``folder``, in the Hugging Face ``hub cache``, or None: it is not.

        Asks no network.
        """
        if (self.where(weights_root) / "pipeline" / "model_index.json").is_file():
            return "folder"
        return "hub cache" if self.hub and self._pipeline(weights_root).cached() else None

    def present(self, weights_root: Path | None = None) -> bool:
        """Whether the pipeline is on this machine."""
        return self.there(weights_root) is not None

    def how(self, weights_root: Path | None = None) -> str:
        """How the weights come onto this machine, for people."""
        if self.how_to_get is not None:
            return self.how_to_get
        part = self._pipeline(weights_root)
        return f"fetched from the Hugging Face Hub ({part.hub}) when they are first used; {part.absent().hint}"

    def source(self, weights_root: Path | None = None, *, allow_pickle: bool = False) -> ModelSource:
        """The model, ready to be planned with and loaded; fetched from the Hub if it is nowhere on this machine.

        Raises:
            NotFoundError: if its weights are not here and cannot be fetched.
            BadRequestError: if they are of a kind that is not known, or pickles and ``allow_pickle`` is not set.
            StorageError: if fetching them fails half way.
        """
        if self.opener is not None:
            return self.opener(self.where(weights_root))
        return self._open(self._pipeline(weights_root, allow_pickle).find(), weights_root, allow_pickle)

    def description(self, weights_root: Path | None = None) -> ModelSource:
        """The model, of which no more than its configuration need be here: layers and sizes, and no weights fetched.

        Raises:
            NotFoundError: if not even the configuration is known.
        """
        if self.opener is not None:
            return self.opener(self.where(weights_root))
        part = self._pipeline(weights_root)
        folder = part.local() or part.cached()
        if folder is not None:
            return self._open(folder, weights_root)
        shipped = CONFIGS / self.name
        folder = shipped if shipped.is_dir() else part.configuration()
        return self._open(folder, weights_root, absent=part.absent())

    def _open(
        self,
        folder: Path,
        weights_root: Path | None,
        allow_pickle: bool = False,
        *,
        absent: NotFoundError | None = None,
    ) -> ModelSource:
        controlnets = self._controlnets(weights_root, allow_pickle)
        return open_folder(self.name, folder, controlnets=controlnets, allow_pickle=allow_pickle, absent=absent)

    def _pipeline(self, weights_root: Path | None, allow_pickle: bool = False) -> Pipeline:
        return Pipeline(
            what=f"the pipeline of model {self.name!r}",
            folder=self.where(weights_root) / "pipeline",
            hub=_id(self.hub["pipeline"]),
            allow_pickle=allow_pickle,
            known=tuple(part for entry in MODELS.values() for part in entry.hub.values()),
        )

    def _controlnets(self, weights_root: Path | None, allow_pickle: bool) -> dict[str, Place]:
        where = self.where(weights_root)
        places: dict[str, Place] = {
            folder.name.removeprefix(_CONTROLNET): folder for folder in sorted(where.glob(f"{_CONTROLNET}*"))
        }
        for part, hub in self.hub.items():
            variant = part.removeprefix(_CONTROLNET)
            if variant != part:
                found = ControlNet(
                    what=f"the {variant} ControlNet of model {self.name!r}",
                    folder=where / part,
                    hub=_id(hub),
                    allow_pickle=allow_pickle,
                )
                places.setdefault(variant, functools.partial(ControlNet.find, found))
        return places


def _id(text: str) -> HubId:
    hub = HubId.parse(text)
    if hub is None:
        raise ValueError(f"{text!r} is no id of the Hugging Face Hub")
    return hub


MODELS: Registry[ModelEntry] = Registry("model")
"""Named models."""

"""What all heads have in common: what they read, what they know, and their tensors."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from featstore.errors import BadRequestError, unknown_name
from featstore.heads.features import FeaturesSpec

KINDS = {
    "classification": "classification:ClassificationHead",
    "correspondence": "correspondence:CorrespondenceHead",
    "pixel": "head:PixelHead",
    "upernet": "upernet:UPerNetHead",
}
"""Every kind of head and where it lives: module of this package and class."""


class Head(abc.ABC):
    """A trained head. `featstore.heads.files` writes and reads any of them."""

    kind: ClassVar[str]
    """Its name in `KINDS` and in head files."""
    config: Any
    """The dataclass that it was built and trained with."""

    @property
    @abc.abstractmethod
    def features(self) -> FeaturesSpec:
        """The features that it reads."""

    @property
    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """What else it needs to know, such as its classes, as plain JSON."""

    @property
    @abc.abstractmethod
    def modules(self) -> dict[str, torch.nn.Module]:
        """Its parts with tensors, by a name that begins the names of the tensors in a file."""

    @classmethod
    @abc.abstractmethod
    def build(cls, features: FeaturesSpec, facts: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """A head with any parameters, for `load`; TypeError, KeyError or ValueError for what describes none."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.tensors().values())).device

    def to(self, device: torch.device | str) -> Self:
        """Move the head."""
        for module in self.modules.values():
            module.to(device)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers."""
        return {
            f"{part}.{name}": value
            for part, module in self.modules.items()
            for name, value in module.state_dict().items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of another head of this shape; RuntimeError where they do not fit.

        Raises:
            BadRequestError: for a tensor that belongs to no part.
        """
        known = tuple(f"{part}." for part in self.modules)
        if strangers := [name for name in tensors if not name.startswith(known)]:
            raise BadRequestError(f"tensor {strangers[0]!r} belongs to no part of a {self.kind!r} head")
        for part, module in self.modules.items():
            prefix = f"{part}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            module.eval()


def head_class(kind: str) -> type[Head]:
    """The class of a kind of head.

    Raises:
        BadRequestError: for an unknown kind.
    """
    if kind not in KINDS:
        raise unknown_name("kind of head", kind, KINDS)
    module, name = KINDS[kind].split(":")
    found: type[Head] = getattr(importlib.import_module(f"featstore.heads.{module}"), name)
    return found

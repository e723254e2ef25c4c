"""Frozen diffusion backbones on stock diffusers.

A model of its own is one module that registers a `ModelEntry` in `MODELS`; any folder in diffusers' layout of a known
family works by its path, and any such repository of the Hugging Face Hub by its id. Nothing here imports torch: that
is `ModelSource.load`.
"""

from __future__ import annotations

import functools
from pathlib import Path

from featstore.errors import BadRequestError, unknown_name
from featstore.models.ddpm import ENTRY as _DDPM
from featstore.models.ddpm import PREFIX as _DDPM_PREFIX
from featstore.models.ddpm import find_ddpm
from featstore.models.entries import MODELS, ModelEntry
from featstore.models.families import open_folder
from featstore.models.hub import HubId
from featstore.models.pixart_alpha import ENTRY as _PIXART_ALPHA
from featstore.models.pixart_sigma import ENTRY as _PIXART_SIGMA
from featstore.models.playground_v2 import ENTRY as _PLAYGROUND_V2
from featstore.models.reference import ENTRY as _REFERENCE
from featstore.models.sd3 import ENTRY as _SD3
from featstore.models.sd15 import ENTRY as _SD15
from featstore.models.sd21 import ENTRY as _SD21
from featstore.models.sdxl import ENTRY as _SDXL
from featstore.models.source import ModelSource
from featstore.recipe import slug

__all__ = ["MODELS", "ModelEntry", "ModelSource", "describe", "public_name", "resolve"]

MODELS.register("reference", _REFERENCE)
MODELS.register("sd15", _SD15)
MODELS.register("sd21", _SD21)
MODELS.register("sdxl", _SDXL)
MODELS.register("playground-v2", _PLAYGROUND_V2)
MODELS.register("pixart-alpha", _PIXART_ALPHA)
MODELS.register("pixart-sigma", _PIXART_SIGMA)
MODELS.register("sd3", _SD3)
MODELS.register("ddpm", _DDPM)


def resolve(name: str, *, weights_root: Path | None = None, allow_pickle: bool = False) -> ModelSource:
    """The model that a name, a path or an id of the Hugging Face Hub stands for.

    Reads configuration files, never weights. What is nowhere on this machine is fetched from the Hub.

    Args:
        name: a name of `MODELS`; the path of a folder in diffusers' layout; ``owner/name`` or
            ``owner/name@revision`` of the Hub. A folder that is there goes before an id; ``./a/b`` and absolute
            paths are always folders. ``ddpm:`` before a path or an id takes unconditional DDPMs only.
        weights_root: folder that weights are looked for in first, as ``<weights_root>/<name>``; None:
            ``$FEATSTORE_WEIGHTS``, else each model's own place.
        allow_pickle: whether weights may be pickles where there are no safetensors.

    Raises:
        BadRequestError: for an unknown name, or a folder with a model of another kind.
        NotFoundError: if the weights are absent and cannot be fetched; the hint says how to get them.
        StorageError: if fetching them fails half way.
    """
    if name in MODELS:
        source = MODELS[name].source(weights_root, allow_pickle=allow_pickle)
    elif name.startswith(_DDPM_PREFIX):
        find = functools.partial(resolve, weights_root=weights_root, allow_pickle=allow_pickle)
        source = find_ddpm(name, find)
    else:
        found = _locate(name)
        if isinstance(found, Path):
            source = open_folder(public_name(name), found, allow_pickle=allow_pickle)
        else:
            source = found.source(weights_root, allow_pickle=allow_pickle)
    source.weights_root = weights_root
    return source


def describe(name: str, *, weights_root: Path | None = None) -> ModelSource:
    """As `resolve`, for its layers and sizes alone: weights are not needed and never fetched.

    Of what is not on this machine, named models have their configuration with featstore; that of an id of the Hub
    is fetched. Using the weights of such a source raises the `NotFoundError` that says how to get them.
    """
    if name in MODELS:
        return MODELS[name].description(weights_root)
    if name.startswith(_DDPM_PREFIX):
        return find_ddpm(name, functools.partial(describe, weights_root=weights_root))
    found = _locate(name)
    return open_folder(public_name(name), found) if isinstance(found, Path) else found.description(weights_root)


def public_name(name: str) -> str:
    """What the model of a name, a path or an id is called in recipes and stores; nothing of it need be there.

    Raises:
        BadRequestError: for a folder without a name.
    """
    name = name.removeprefix(_DDPM_PREFIX)
    folder = Path(name).expanduser()
    if name in MODELS or not ("/" in name or folder.is_dir()):
        return name
    hub = None if folder.is_dir() else HubId.parse(name)
    public = hub.name if hub is not None else slug(folder.resolve().name).strip("._-")
    if not public:
        raise BadRequestError(f"the folder {folder} has no name to call its model by")
    return public


def _locate(name: str) -> Path | ModelEntry:
    """The folder of a path, or the entry of an id."""
    folder = Path(name).expanduser()
    hub = None if folder.exists() else HubId.parse(name)
    if hub is not None:
        # A folder of weights has no revision: one that is asked for is looked for by its name.
        below = hub.name if hub.revision is None else f"{hub.name}@{slug(hub.revision)}"
        return ModelEntry(name=hub.name, title=str(hub), family="", hub={"pipeline": str(hub)}, subfolder=below)
    if folder.is_file():
        raise BadRequestError(f"{folder} is a file; a model is a folder in diffusers' layout")
    if "/" in name or folder.is_dir():
        return folder
    raise unknown_name("model", name, [*MODELS, "PATH of a diffusers folder", "OWNER/NAME of the Hugging Face Hub"])

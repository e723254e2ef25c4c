"""Unconditional DDPMs: ``ddpm:PATH`` for any folder of one, ``ddpm`` for one in the weights root.

The entry's configuration is that of guided-diffusion's LSUN models at 256 px, those of ddpm-segmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from featstore.errors import BadRequestError, NotFoundError
from featstore.models.entries import CONFIGS, WEIGHTS_VARIABLE, ModelEntry
from featstore.models.families import open_folder
from featstore.models.families.ddpm import DDPM
from featstore.models.source import ModelSource

PREFIX = "ddpm:"
_CONVERT = "featstore convert-ddpm lsun_horse.pt {folder} --allow-pickle"


def find_ddpm(name: str, find: Callable[[str], ModelSource]) -> ModelSource:
    """The DDPM of ``ddpm:PATH``.

    Args:
        name: with its prefix.
        find: gives the model of what stands after the prefix.

    Raises:
        NotFoundError: if it is not there.
        BadRequestError: if it is a model of another kind.
    """
    place = name.removeprefix(PREFIX)
    try:
        source = find(place)
    except NotFoundError as error:
        error.hint = error.hint or f"`{_CONVERT.format(folder=place)}` makes one of a guided-diffusion checkpoint"
        raise
    return _checked(name, place, source)


def _checked(name: str, place: str, source: ModelSource) -> ModelSource:
    if not isinstance(source, DDPM):
        raise BadRequestError(
            f"{name!r} is no unconditional DDPM but a {type(source).__name__}", hint=f"--model {place} takes it"
        )
    return source


def _open(weights: Path) -> ModelSource:
    folder = weights / "pipeline"
    if (folder / "model_index.json").is_file():
        return _checked("ddpm", str(folder), open_folder("ddpm", folder))
    absent = NotFoundError(
        f"the weights of model 'ddpm' are not in {folder}",
        hint=f"`{_CONVERT.format(folder=folder)}` makes them of ddpm-segmentation's checkpoint; --model {PREFIX}PATH "
        "takes any other folder",
    )
    return open_folder("ddpm", CONFIGS / "ddpm", absent=absent)


ENTRY = ModelEntry(
    name="ddpm",
    title="unconditional DDPM of ddpm-segmentation, 256 px; any other by ddpm:PATH",
    family="DDPM (UNet2DModel)",
    how_to_get=f"`{_CONVERT.format(folder=f'${WEIGHTS_VARIABLE}/ddpm/pipeline')}`, with a checkpoint that the README "
    "of github.com/yandex-research/ddpm-segmentation links",
    opener=_open,
)

"""Pictures to PNG bytes, figures to PNG or SVG, and files that are either whole or not there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from featstore.errors import BadRequestError, StorageError
from featstore.whole_file import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
"""What figures are written as, by the ending of their name."""


def png_bytes(picture: npt.NDArray[np.uint8]) -> bytes:
    """A picture uint8 (H, W, 3) as a PNG file."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise BadRequestError(f"a picture is uint8 (H, W, 3), not {picture.dtype} {picture.shape}")
    return _png(picture)


def _png(picture: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save_picture(path: Path, picture: npt.NDArray[np.uint8]) -> Path:
    """Write a picture uint8 (H, W, 3), or labels uint8 (H, W) as they are, as a PNG file (`publish`)."""
    return publish(path, _png(picture) if picture.ndim == 2 and picture.dtype == np.uint8 else png_bytes(picture))


def publish(path: Path, content: bytes) -> Path:
    """Write a file at once: others see the old one or the whole new one. Missing folders are made.

    Raises:
        StorageError: if that is not possible.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content, durable=False)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror}", hint="free space or name another folder"
        ) from error
    return path


def figure_format(path: Path) -> str:
    """What a figure of that name is written as: ``png`` or ``svg``.

    Raises:
        BadRequestError: for another ending, or none.
    """
    ending = path.suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise BadRequestError(
            f"picture {str(path)!r} ends neither in .png nor in .svg", hint=f"name it {path.stem or 'picture'}.png"
        )
    return ending


def save_figure(path: Path, figure: Figure) -> Path:
    """Write a figure of matplotlib as its name's ending says (`figure_format`, `publish`).

    The same figure gives the same bytes: no date, no version, no random names.
    """
    from matplotlib import rc_context

    ending = figure_format(path)
    buffer = io.BytesIO()
    metadata = {"Software": None} if ending == "png" else {"Date": None, "Creator": None}
    with rc_context({"svg.hashsalt": "featstore"}):
        figure.savefig(buffer, format=ending, dpi=figure.dpi, metadata=metadata)
    return publish(path, buffer.getvalue())

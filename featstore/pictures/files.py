"""Pictures to PNG bytes, and files that are either whole or not there."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from featstore.errors import BadRequestError, StorageError
from featstore.whole_file import write_whole


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

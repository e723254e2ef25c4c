"""Pictures remade by Img2Img in a grid: the input, then each technique's, a row an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featstore.pictures.grid import Panel, save_grid


def save_img2img(
    path: Path,
    inputs: npt.NDArray[np.uint8],
    remade: Mapping[str, npt.NDArray[np.uint8]],
    *,
    captions: Mapping[str, str] | None = None,
    row_titles: Sequence[str] = (),
    title: str = "",
) -> Path:
    """Draw inputs and what techniques made of them into a picture.

    Args:
        path: the file; its folder is made.
        inputs: uint8 (n, H, W, 3).
        remade: the same n images by technique, e.g. ``basic`` for without any, then with each.
        captions: what stands after some techniques' names, e.g. a similarity.
        row_titles: names of the n rows; may be empty.
        title: above everything.

    Raises:
        BadRequestError: if there are no images, or numbers of them differ.
        StorageError: if the file cannot be written.
    """
    panels = [Panel(title="input", pictures=tuple(inputs))]
    for name, pictures in remade.items():
        words = f"{name} {(captions or {}).get(name, '')}".strip()
        panels.append(Panel(title=words, pictures=tuple(pictures)))
    return save_grid(path, panels, row_titles=row_titles, title=title)

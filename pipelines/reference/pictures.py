"""Pictures of the model card: grids of images, and the loss curves."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image

from featstore.pipelines.reference.config import TRAINED

mpl.use("Agg")
import matplotlib.pyplot as plt

U8 = npt.NDArray[np.uint8]


def save_grid(file: Path, rows: list[list[U8]], *, zoom: int = 1, gap: int = 2) -> None:
    """Write rows of (H, W, 3) uint8 images as one PNG.

    Args:
        file: where to.
        rows: the images; rows may differ in length.
        zoom: whole-number enlargement.
        gap: white pixels between images.
    """
    height, width, _ = rows[0][0].shape
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = r * (height + gap), c * (width + gap)
            canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas)
    if zoom > 1:
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, optimize=True)


def save_loss_curves(file: Path, logs: Path) -> None:
    """Draw the losses of all stages from their JSON lines in ``logs``."""
    stages = [name for name in TRAINED if (logs / f"{name}.jsonl").exists()]
    if not stages:
        return
    figure, axes = plt.subplots(1, len(stages), figsize=(3.2 * len(stages), 2.6), squeeze=False)
    for axis, name in zip(axes[0], stages, strict=True):
        steps, losses = _read(logs / f"{name}.jsonl", "loss")
        window = max(1, len(losses) // 100)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid") if losses else np.zeros(0)
        axis.plot(steps[: len(smooth)], smooth, linewidth=1, label="training")
        axis.set_title(name, fontsize=9)
        axis.set_yscale("log")
        axis.tick_params(labelsize=7, which="both")
        if name == "lora" and (logs / "lora-validation.jsonl").exists():
            for key in ("validation", "train"):
                axis.plot(*_read(logs / "lora-validation.jsonl", key), linewidth=1, label=f"{key} split")
            axis.legend(fontsize=6)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def _read(file: Path, key: str) -> tuple[list[float], list[float]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row["step"] for row in rows], [row[key] for row in rows]

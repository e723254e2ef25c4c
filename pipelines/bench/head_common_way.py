"""How heads are trained without featstore, for comparison: all maps upsampled first, one pixel after another.

The steps of ddpm-segmentation and of the code that followed it: every map of every image to the labels' size in
float32, all of them in one tensor, that tensor turned into rows of pixels, the labelled ones picked; then a
``DataLoader`` in batches of 64, and one member of the ensemble after another.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

Maps = Mapping[str, npt.NDArray[np.float16]]
"""Layer name to (N, C, H, W)."""


class _Pixels(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, rows: Tensor, labels: Tensor) -> None:
        self.rows, self.labels = rows, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.rows[index], self.labels[index]


class _Member(nn.Module):
    """Assigners, amalgamation and MLP of one member, as `featstore.heads.pixels` has them."""

    def __init__(self, runs: int, channels: int, beside: int, assigners: int, classes: int) -> None:
        super().__init__()
        self.shape = (runs, channels)
        self.assigners = nn.ModuleList(
            nn.Sequential(nn.Linear(runs * channels, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, runs))
            for _ in range(assigners if runs > 1 else 0)
        )
        first, second = (256, 128) if classes >= 30 else (128, 32)
        width = channels * max(1, len(self.assigners)) + beside
        self.mlp = nn.Sequential(
            *(nn.Linear(width, first), nn.ReLU(), nn.BatchNorm1d(first)),
            *(nn.Linear(first, second), nn.ReLU(), nn.BatchNorm1d(second)),
            nn.Linear(second, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        runs, channels = self.shape
        flat, beside = x[:, : runs * channels], x[:, runs * channels :]
        vectors = flat.view(-1, runs, channels)
        mixed = [(assigner(flat).softmax(1).unsqueeze(2) * vectors).sum(1) for assigner in self.assigners] or [flat]
        said: Tensor = self.mlp(torch.cat([*mixed, beside], 1))
        return said


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What the common way gave."""

    members: list[nn.Module]
    prepare_seconds: float
    """Upsampling everything, and making rows of pixels of it."""
    train_seconds: float
    pixels: int
    """Labelled pixels that were trained on, each as often as it was."""


def train(
    bucket: Sequence[Maps], beside: Maps, masks: npt.NDArray[np.uint8], *, members: int, steps: int, classes: int
) -> Trained:
    """Train ``members`` one after the other, for ``steps`` steps of 64 pixels each."""
    start = time.perf_counter()
    rows, labels = _rows(bucket, beside, masks)
    prepared = time.perf_counter()
    channels = sum(maps.shape[1] for maps in bucket[0].values())
    trained: list[nn.Module] = []
    for seed in range(members):
        torch.manual_seed(seed)
        member = _Member(len(bucket), channels, sum(maps.shape[1] for maps in beside.values()), 2, classes)
        optimizer = torch.optim.Adam(member.parameters(), lr=1e-3)
        done = 0
        while done < steps:
            for vectors, truth in DataLoader(_Pixels(rows, labels), batch_size=64, shuffle=True, drop_last=True):
                optimizer.zero_grad()
                loss = functional.cross_entropy(member(vectors), truth)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                done += 1
                if done == steps:
                    break
        trained.append(member.eval())
    end = time.perf_counter()
    return Trained(
        members=trained,
        prepare_seconds=prepared - start,
        train_seconds=end - prepared,
        pixels=64 * steps * members,
    )


@torch.inference_mode()
def predict(members: Sequence[nn.Module], bucket: Sequence[Maps], beside: Maps, size: tuple[int, int]) -> Tensor:
    """Labels (N, h, w) by majority vote of the members."""
    images = len(next(iter(bucket[0].values())))
    rows, _ = _rows(bucket, beside, np.zeros((images, *size), np.uint8))
    votes = torch.stack([member(rows).argmax(1) for member in members])
    return votes.mode(0).values.view(images, *size)


def _rows(bucket: Sequence[Maps], beside: Maps, masks: npt.NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Vectors (P, values of a pixel) float32 and labels (P,) of all labelled pixels."""
    size = masks.shape[1:]
    layers = [*(maps for run in bucket for maps in run.values()), *beside.values()]
    everything = torch.zeros(len(masks), sum(maps.shape[1] for maps in layers), *size)
    for image, target in enumerate(everything):
        one = [torch.from_numpy(maps[image : image + 1]).float() for maps in layers]
        target.copy_(torch.cat([functional.interpolate(m, size, mode="bilinear", align_corners=False)[0] for m in one]))
    width = everything.shape[1]
    rows = everything.permute(1, 0, 2, 3).reshape(width, -1).permute(1, 0)
    labels = torch.from_numpy(masks.reshape(-1).astype(np.int64))
    return rows[labels != 255], labels[labels != 255]

"""What a head is compared with: a network trained on the images themselves, on the same split.

B images of a batch, H W height and width in pixels, c classes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featstore.datasets import Dataset
from featstore.errors import BadRequestError, IncompatibleError, unknown_name

if TYPE_CHECKING:
    import torch

    from featstore.heads import ClassificationTask

BASELINES = ("resnet50",)
"""Names of the networks, as timm has them."""

KEPT_BYTES = 512 * 1024**2
"""Bytes of decoded images that are kept from epoch to epoch."""
_THREADS = 8
_PROGRESS_STEPS = 5

Order = Iterator[npt.NDArray[np.int64]]
UInt8Array = npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BaselineConfig:
    """Which network, and how it is trained."""

    name: str = "resnet50"
    """One of `BASELINES`."""
    weights: Path | None = None
    """File of safetensors to begin with, in timm's names; None: random weights. Another last layer is left out."""
    learning_rate: float = 1e-3
    """First step size of AdamW; it falls to 0 along half a cosine."""
    weight_decay: float = 0.05
    """AdamW's decay of weights."""
    batch_size: int = 32
    """Images of a step at most."""
    epochs: int = 30
    """Passes over the training images, unless ``least_steps`` takes more."""
    least_steps: int = 150
    """Steps that few images are gone through again and again for."""
    flip: bool = True
    """Whether half of the training images are mirrored, others in every epoch."""
    max_steps: int | None = None
    """Steps at most, for quick looks."""

    def __post_init__(self) -> None:
        """Refuse an unknown network, and weights that are not there or could run code."""
        if self.name not in BASELINES:
            raise unknown_name("baseline", self.name, BASELINES)
        for field, least in (("batch_size", 4), ("epochs", 1), ("least_steps", 1)):
            if getattr(self, field) < least:
                raise BadRequestError(f"{field} {getattr(self, field)} must be {least} or more")
        if self.weights is not None and (self.weights.suffix != ".safetensors" or not self.weights.is_file()):
            what = "is no .safetensors file" if self.weights.exists() else "does not exist"
            raise BadRequestError(
                f"weights {self.weights} {what}",
                hint="name model.safetensors of a timm ResNet-50, e.g. of timm/resnet50.a1_in1k, or none",
            )

    def steps(self, images: int) -> int:
        """Steps of a training on this many images."""
        steps = max(self.epochs * math.ceil(images / self.batch_size), self.least_steps)
        return steps if self.max_steps is None else min(steps, self.max_steps)


class Images:
    """Images of a data set at one size, decoded in threads a batch ahead of who iterates."""

    def __init__(
        self, dataset: Dataset, keys: Sequence[str], height_px: int, width_px: int, *, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self._dataset, self._keys, self._size = dataset, keys, (height_px, width_px)
        self._kept: dict[int, UInt8Array] = {}
        self._room = kept_bytes // (3 * height_px * width_px)

    def batches(self, orders: Order) -> Iterator[tuple[npt.NDArray[np.int64], UInt8Array]]:
        """Rows (B,) of each order and their images (B, H, W, 3), RGB.

        Raises:
            UnreadableImageError: if an image cannot be read.
        """
        threads = min(os.cpu_count() or 1, _THREADS)
        with concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="featstore-images") as pool:

            def ask() -> tuple[npt.NDArray[np.int64], list[concurrent.futures.Future[UInt8Array]]] | None:
                rows = next(orders, None)
                return None if rows is None else (rows, [pool.submit(self._read, row) for row in rows.tolist()])

            try:
                ahead = ask()
                while ahead is not None:
                    (rows, reads), ahead = ahead, ask()
                    yield rows, np.stack([read.result() for read in reads])
            finally:
                pool.shutdown(cancel_futures=True)

    def _read(self, row: int) -> UInt8Array:
        from featstore.extraction.images import prepare

        if row in self._kept:
            return self._kept[row]
        image = prepare(self._dataset.image(self._keys[row]), *self._size)
        if len(self._kept) < self._room:
            self._kept[row] = image
        return image


def train_baseline(
    images: Images,
    task: ClassificationTask,
    config: BaselineConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train a network on the training images and score it on the test images.

    On the CPU the result depends on images, task, configuration, seed and number of torch threads only.

    Args:
        images: of all rows of the task.
        task: labels and split; its features are not looked at.
        config: of the network and its training.
        seed: of initial weights, batches and mirrored images.
        device: where to train.
        progress: called with steps done and steps at most.

    Returns:
        What `ClassificationScores.to_json` has, ``train_images``, ``test_images`` and ``steps``.

    Raises:
        BadRequestError: for a task that cannot be trained on.
        IncompatibleError: for weights of another network.
        UnreadableImageError: if an image cannot be read.
    """
    import torch
    from torch.nn import functional

    from featstore.metrics_classification import classification_scores

    task.check_training()
    net = _network(config, len(task.classes), seed).to(device)
    rows, tested = (np.unique(np.asarray(part, np.int64)) for part in (task.train_rows, task.test_rows))
    steps = config.steps(len(rows))
    adam = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    labels = torch.from_numpy(task.labels.astype(np.int64))
    generator = np.random.default_rng([seed, 1])
    net.train()
    for step, (batch, pixels) in enumerate(images.batches(_orders(rows, config.batch_size, steps, seed))):
        for group in adam.param_groups:
            group["lr"] = config.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        x = _inputs(pixels, device)
        if config.flip:
            mirrored = torch.from_numpy(generator.random(len(batch)) < 0.5).to(device)
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        loss = functional.cross_entropy(net(x), labels[torch.from_numpy(batch)].to(device))
        adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        if progress is not None and ((step + 1) % _PROGRESS_STEPS == 0 or step + 1 == steps):
            progress(step + 1, steps)
    net.eval()
    said = np.empty((len(tested), len(task.classes)), np.float32)
    parts = np.split(tested, range(config.batch_size, len(tested), config.batch_size)) if len(tested) else []
    with torch.inference_mode():
        for batch, pixels in images.batches(iter(parts)):
            said[np.searchsorted(tested, batch)] = net(_inputs(pixels, device)).softmax(1).cpu().numpy()
    scores = classification_scores(said, task.labels[tested].astype(np.int64), task.classes)
    return {**scores.to_json(), "train_images": len(rows), "test_images": len(tested), "steps": steps}


def _orders(rows: npt.NDArray[np.int64], batch: int, steps: int, seed: int) -> Order:
    """Rows of each step: every epoch in another order, in parts of nearly one size, as norms cannot take one image."""
    epoch = 0
    while steps > 0:
        parts = np.array_split(np.random.default_rng([seed, 0, epoch]).permutation(rows), math.ceil(len(rows) / batch))
        yield from parts[:steps]
        steps -= len(parts)
        epoch += 1


def _inputs(pixels: UInt8Array, device: str) -> torch.Tensor:
    """Images (B, H, W, 3) as (B, 3, H, W) float32, standardised as timm's own weights have it (ImageNet)."""
    import torch
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (x - mean) / std


def _network(config: BaselineConfig, classes: int, seed: int) -> torch.nn.Module:
    import timm
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net: torch.nn.Module = timm.create_model(config.name, pretrained=False, num_classes=classes)
    if config.weights is not None:
        _load(net, config.weights)
    return net


def _load(net: torch.nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        given = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadRequestError(f"cannot read the weights {path}: {error}", hint="name another file") from error
    own = net.state_dict()
    last = tuple(name for name in own if name.startswith("fc.") and given.get(name, own[name]).shape != own[name].shape)
    given = {name: value for name, value in given.items() if name not in last}
    wrong = [name for name, value in given.items() if name not in own or value.shape != own[name].shape]
    wrong += [n for n in own if n not in given and not n.startswith("fc.") and not n.endswith("num_batches_tracked")]
    if wrong:
        raise IncompatibleError(
            f"{path} holds the weights of another network: {wrong[0]!r} does not fit",
            hint="name model.safetensors of a timm ResNet-50, e.g. of timm/resnet50.a1_in1k",
        )
    net.load_state_dict(given, strict=False)

"""Training of correspondence heads, pair by pair.

P points that a pair has in common, D channels of a layer, H W its height and width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import BadRequestError
from featstore.heads.correspondence import CorrespondenceHead
from featstore.heads.correspondence_net import CorrespondenceConfig
from featstore.heads.correspondence_points import Grid, at_points
from featstore.heads.correspondence_reading import Held, PairReader
from featstore.heads.correspondence_scoring import score_correspondence
from featstore.heads.correspondence_task import CorrespondenceTask, shared
from featstore.heads.map_amalgamation import regulariser
from featstore.heads.stream import Maps, Stream

Progress = Callable[[int, int], None]
"""Called with steps done and steps at most."""

_PROGRESS_STEPS = 50
_STATISTICS_BATCH = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorrespondenceResult:
    """A trained head and what it finds in the test pairs."""

    head: CorrespondenceHead
    """The trained head, on the device that it was trained on."""
    metrics: dict[str, Any]
    """Plain JSON: the fields of `CorrespondenceScores`, ``per_category`` (the same by category), ``assigner_weights``
    (for each layer, for each assigner, the mean weight of each run; {} for one run), ``train_pairs``,
    ``train_images``, ``test_images``, ``steps``."""
    losses: tuple[float, ...]
    """Cross-entropy of each step, in nats; empty where nothing was trained."""


def train_correspondence(
    task: CorrespondenceTask,
    config: CorrespondenceConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> CorrespondenceResult:
    """Train a correspondence head on the training pairs and score it on the test pairs.

    A head without convolutions on a single run has no parameters that matter: it takes the statistics of the
    training images and is scored. On the CPU the result depends on task, configuration, seed and number of
    torch threads only.

    Args:
        task: features, points and pairs.
        config: of the head and its training; None: the defaults.
        seed: of initial parameters and of the order of pairs.
        device: where to train and match.
        progress: called with steps done and steps at most.

    Raises:
        BadRequestError: if there is no training pair.
        FeatstoreError: what the arrays' own tasks raise, such as NotCommittedError of a store.
    """
    config = CorrespondenceConfig() if config is None else config
    if not len(task.train_pairs):
        raise BadRequestError("no training pairs", hint="correspondence needs 2 images of one category or more")
    head = CorrespondenceHead.untrained(task.features.spec(), config, seed=seed).to(device)
    rows = np.unique(task.train_pairs)
    head.standardise.fit(Stream(features=task.features, rows=rows, batch=_STATISTICS_BATCH).epoch(0))
    losses: list[float] = []
    if config.trains(len(head.features.runs)):
        losses = _train(head, task, seed, progress)
    metrics = score_correspondence(task, head)
    metrics |= {"train_pairs": len(task.train_pairs), "train_images": len(rows), "steps": len(losses)}
    return CorrespondenceResult(head=head, metrics=metrics, losses=tuple(losses))


def pair_loss(head: CorrespondenceHead, layers: dict[str, Tensor], source_xy: Tensor, target_xy: Tensor) -> Tensor:
    """Symmetric cross-entropy of a pair: each point has to choose its partner, in both directions.

    As in CLIP, cosines times a learnt scale are the logits; what a point chooses from is
    `CorrespondenceConfig.negatives`.

    Args:
        head: for its temperature and the size of its largest map.
        layers: layer name to (2, D, H, W) float32, source and target.
        source_xy: (P, 2) float32, x and y in 0..1.
        target_xy: (P, 2) float32, the same points in the target.

    Returns:
        () float32, mean over points and directions, in nats.
    """
    images = [{name: value[place] for name, value in layers.items()} for place in range(2)]
    vectors = [at_points(image, xy) for image, xy in zip(images, (source_xy, target_xy), strict=True)]
    if head.config.negatives == "points":
        source, target = (functional.normalize(one, dim=1) for one in vectors)
        logits = head.net.scale * source @ target.T
        partner = torch.arange(len(logits), device=logits.device)
        return (functional.cross_entropy(logits, partner) + functional.cross_entropy(logits.T, partner)) / 2
    losses = []
    for image, xy, others in ((images[1], target_xy, vectors[0]), (images[0], source_xy, vectors[1])):
        grid = Grid(image, head.map_size)
        losses.append(functional.cross_entropy(head.net.scale * grid.cosines(others).flatten(1), grid.positions(xy)))
    return torch.stack(losses).mean()


def _train(head: CorrespondenceHead, task: CorrespondenceTask, seed: int, progress: Progress | None) -> list[float]:
    config, net = head.config, head.net
    adam = torch.optim.AdamW(net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    images = len(np.unique(task.train_pairs))
    epoch = min(config.epoch_steps, config.image_steps * images, len(task.train_pairs))
    most = config.epochs * epoch
    most = most if config.max_steps is None else min(most, config.max_steps)
    losses: list[Tensor] = []
    net.train()
    for maps, source_xy, target_xy in _steps(head, task, epoch, most, seed):
        layers, weights = _embed_pair(head, maps)
        loss = pair_loss(head, layers, source_xy, target_xy)
        adam.zero_grad(set_to_none=True)
        objective = loss + regulariser(weights, config.gamma1, config.gamma2).to(loss.device)
        objective.backward()  # type: ignore[no-untyped-call]
        adam.step()
        losses.append(loss.detach())
        if progress is not None and (len(losses) % _PROGRESS_STEPS == 0 or len(losses) == most):
            progress(len(losses), most)
    net.eval()
    return torch.stack(losses).tolist()


def _embed_pair(head: CorrespondenceHead, maps: Maps) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found = head.net(*head.standardise(maps.to(head.device)))
    return found.layers, found.weights


def _steps(
    head: CorrespondenceHead, task: CorrespondenceTask, epoch: int, most: int, seed: int
) -> Iterator[tuple[Maps, Tensor, Tensor]]:
    """Maps of a pair and its common points (P, 2) in both images, step by step."""
    config = head.config
    reader = PairReader(features=task.features, window_bytes=config.window_bytes)
    done = 0
    for number in range(config.epochs):
        rng = np.random.default_rng([seed, number])
        drawn = rng.permutation(len(task.train_pairs))[: min(epoch, most - done)]
        for start in range(0, len(drawn), config.mix_steps):
            pairs = task.train_pairs[drawn[start : start + config.mix_steps]]
            for visit, held in reader.read(pairs, reader.order(pairs, rng)):
                for source, target in pairs[visit.pairs].tolist():
                    yield _pair(head, task, held, (source, target), mirrored=rng.random() < config.mirror)
        done += len(drawn)


def _pair(
    head: CorrespondenceHead, task: CorrespondenceTask, held: Held, rows: tuple[int, int], *, mirrored: bool
) -> tuple[Maps, Tensor, Tensor]:
    source, target = (task.points[row] for row in rows)
    maps = held.maps(*rows)
    here, there = shared(source, target, mirrored=mirrored)
    target_xy = target.xy[there]
    if mirrored and len(here):
        maps = mirrored_target(maps)
        target_xy = np.stack([1 - target_xy[:, 0], target_xy[:, 1]], 1)
    elif mirrored:  # all that the two show are sides that the mirror exchanges
        here, there = shared(source, target)
        target_xy = target.xy[there]
    return maps, torch.from_numpy(source.xy[here]).to(head.device), torch.from_numpy(target_xy).to(head.device)


def mirrored_target(maps: Maps) -> Maps:
    """The maps of two images, the second one's mirrored from left to right."""

    def mirrored(value: Tensor) -> Tensor:
        return torch.stack([value[0], value[1].flip(-1)])

    return Maps(
        rows=maps.rows,
        layers={name: mirrored(value) for name, value in maps.layers.items()},
        beside={name: mirrored(value) for name, value in maps.beside.items()},
    )

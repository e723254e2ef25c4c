"""Training of all members of a pixel head at once, each as if it were alone.

A member has its own initial parameters, its own order of pixels and its own end; what it becomes
depends on the seed and its number, not on how many others train beside it (up to rounding).

M members still training, b pixels of a member's batch, P labelled training pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import BadRequestError
from featstore.heads.amalgamation import regulariser
from featstore.heads.pixels import PixelHeadConfig, PixelMembers
from featstore.heads.sampled import SampledTables
from featstore.heads.tables import PixelTables

Progress = Callable[[int, int], None]
"""Called with steps done and steps at most."""

_PROGRESS_STEPS = 50
_GATHERED_BYTES = 4 * 1024**2
_GROUP_BYTES = 16 * 1024**2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLog:
    """What a training did."""

    steps: tuple[int, ...]
    """Steps that each member took."""
    losses: tuple[float, ...]
    """Cross-entropy of each member's last batch, in nats."""
    steps_an_epoch: int
    """Batches of one pass over the labelled pixels."""


def member_losses(
    members: PixelMembers, runs: Tensor, attention: Tensor, labels: Tensor, config: PixelHeadConfig
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each member, and what it minimises (with the regulariser of the assigners).

    Args:
        members: the M members.
        runs: (M, b, K, C) float32, standardised.
        attention: (M, b, A) float32, standardised.
        labels: (M, b) int64.
        config: for the regulariser's factors.

    Returns:
        Two tensors (M,): cross-entropy without gradient, and the objective.
    """
    logits, weights = members(runs, attention)
    entropy = functional.cross_entropy(logits, labels, reduction="none").mean(1)
    objective = entropy if weights is None else entropy + regulariser(weights, config.gamma1, config.gamma2)
    return entropy.detach(), objective


class _Adam:
    """Adam over members, some of which may leave."""

    def __init__(self, members: PixelMembers, learning_rate: float) -> None:
        self._rate = learning_rate
        self._adam = torch.optim.Adam(members.parameters(), lr=learning_rate, fused=True)

    def step(self, objective: Tensor) -> None:
        # Members share no parameter, so the sum's gradient is each one's own.
        self._adam.zero_grad(set_to_none=True)
        objective.sum().backward()  # type: ignore[no-untyped-call]
        self._adam.step()

    def keep(self, before: PixelMembers, after: PixelMembers, index: Sequence[int]) -> None:
        """Go on with members ``index`` of ``before``, which ``after`` holds; their moments come along."""
        old = self._adam
        self._adam = torch.optim.Adam(after.parameters(), lr=self._rate, fused=True)
        for p_old, p_new in zip(before.parameters(), after.parameters(), strict=True):
            state = old.state[p_old]
            moments = {k: state[k][list(index)].clone() for k in ("exp_avg", "exp_avg_sq")}
            self._adam.state[p_new] = {"step": state["step"].clone(), **moments}


def train_members(
    members: PixelMembers,
    tables: PixelTables | SampledTables,
    pixels: Tensor,
    labels: Tensor,
    config: PixelHeadConfig,
    *,
    generators: Sequence[torch.Generator],
    progress: Progress | None = None,
) -> TrainingLog:
    """Train in place.

    Args:
        members: the M members, changed in place and left in evaluation mode.
        tables: maps of the training images, standardised.
        pixels: (P,) int64 names of the labelled pixels in ``tables``.
        labels: (P,) int64 classes of those pixels.
        config: sizes, rates and when to stop.
        generators: one a member, on the CPU; each member draws its orders of pixels from its own.
        progress: called every 50 steps and at the end.

    Raises:
        BadRequestError: with fewer than two labelled pixels.
    """
    if len(pixels) < 2:
        raise BadRequestError(f"{len(pixels)} labelled training pixels; at least 2 are needed")
    batch = min(config.batch_size, len(pixels))
    steps_an_epoch = len(pixels) // batch
    most = config.max_epochs * steps_an_epoch
    most = most if config.max_steps is None else min(most, config.max_steps)

    groups = _groups(members, tables.device)
    steps, losses = [0] * members.members, [float("nan")] * members.members
    done = 0

    def told(last: int, step: int) -> None:
        if progress is not None:
            progress(done + step, done + last)

    members.train()
    for number, group in enumerate(groups):
        later = (len(groups) - number) * most
        course = _Course(
            tables=tables, pixels=pixels, labels=labels, config=config, batch=batch, steps=steps_an_epoch, most=most
        )
        for member, one in course.run(members, group, generators, functools.partial(told, later)).items():
            steps[member], losses[member] = one
        done += max(steps[member] for member in group)
    members.eval()
    told(0, 0)
    return TrainingLog(steps=tuple(steps), losses=tuple(losses), steps_an_epoch=steps_an_epoch)


def _groups(members: PixelMembers, device: torch.device) -> list[list[int]]:
    """Members that train side by side: all on a GPU; on a CPU as many as make no tensor too large for its heap.

    glibc maps what is larger than 32 MiB anew each time, and touching fresh pages costs as much as a gradient.
    """
    if device.type != "cpu":
        return [list(range(members.members))]
    largest = max(p.numel() * p.element_size() for p in members.parameters()) // members.members
    size = max(1, _GROUP_BYTES // largest)
    return [list(range(first, min(first + size, members.members))) for first in range(0, members.members, size)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Course:
    """Training of one group of members."""

    tables: PixelTables | SampledTables
    pixels: Tensor
    labels: Tensor
    config: PixelHeadConfig
    batch: int
    steps: int
    """Steps of an epoch."""
    most: int
    """Steps at most."""

    def run(
        self,
        members: PixelMembers,
        group: Sequence[int],
        generators: Sequence[torch.Generator],
        told: Callable[[int], None],
    ) -> dict[int, tuple[int, float]]:
        """Train members ``group`` of ``members`` in place; steps taken and last loss of each."""
        config, device = self.config, self.tables.device
        active, ids = members.take(group), list(group)
        adam = _Adam(active, config.learning_rate)
        found: dict[int, tuple[int, float]] = {}
        best = torch.full((len(ids),), torch.inf, device=device)
        waited = torch.zeros(len(ids), dtype=torch.int64, device=device)
        loss = best
        step = 0

        def leave(stopped: Sequence[int]) -> None:
            values = loss.tolist()
            found.update({ids[place]: (step, values[place]) for place in stopped})
            members.put([ids[place] for place in stopped], active, stopped)

        while step < self.most and ids:
            count = len(self.pixels)
            orders = torch.stack([torch.randperm(count, generator=generators[m], dtype=torch.int32) for m in ids])
            batches = _Batches(self.tables, self.pixels, self.labels, orders.to(device), self.batch)
            counting = step >= config.free_epochs * self.steps
            for number in range(min(self.steps, self.most - step)):
                loss, objective = member_losses(active, *batches.get(number), config)
                adam.step(objective)
                step += 1
                if step % _PROGRESS_STEPS == 0:
                    told(step)
                if not counting:
                    continue
                better = loss < best
                best = torch.where(better, loss, best)
                waited = torch.where(better, 0, waited + 1)
                done = (waited >= config.patience_steps).tolist()
                if any(done):
                    leave([place for place, over in enumerate(done) if over])
                    stay = [place for place, over in enumerate(done) if not over]
                    ids = [ids[place] for place in stay]
                    if not ids:
                        break
                    before, active = active, active.take(stay)
                    adam.keep(before, active, stay)
                    best, waited, loss = best[stay], waited[stay], loss[stay]
                    batches.keep(stay)
        leave(range(len(ids)))
        return found


class _Batches:
    """One epoch's batches; vectors are gathered a few steps at a time, which saves most of the overhead."""

    def __init__(
        self,
        tables: PixelTables | SampledTables,
        pixels: Tensor,
        labels: Tensor,
        orders: Tensor,
        batch: int,
    ) -> None:
        self._tables = tables
        self._pixels, self._labels, self._orders, self._batch = pixels, labels, orders, batch
        self._window = max(1, _GATHERED_BYTES // (4 * tables.width * batch * len(orders)))
        self._first = -1
        self._held: tuple[Tensor, Tensor, Tensor] | None = None
        self._memory = tables.empty(self._window * orders.shape[0] * batch)

    def get(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Runs (M, b, K, C), attention (M, b, A) and labels (M, b) of a step."""
        first = number - number % self._window
        if self._held is None or first != self._first:
            end = min((first + self._window) * self._batch, len(self._pixels) // self._batch * self._batch)
            picked = self._orders[:, first * self._batch : end].reshape(len(self._orders), -1, self._batch)
            # step by step in memory, so that one step's vectors are one piece
            picked = picked.transpose(0, 1).contiguous()
            runs, attention = self._tables.gather(self._pixels[picked.view(-1)], self._room(picked.numel()))
            self._first = first
            self._held = (
                runs.view(*picked.shape, *runs.shape[1:]),
                attention.view(*picked.shape, attention.shape[1]),
                self._labels[picked],
            )
        runs, attention, labels = self._held
        return runs[number - first], attention[number - first], labels[number - first]

    def _room(self, pixels: int) -> tuple[Tensor, Tensor]:
        return self._memory[0][:pixels], self._memory[1][:pixels]

    def keep(self, places: Sequence[int]) -> None:
        """Go on with some of the members."""
        self._orders = self._orders[list(places)]
        if self._held is not None:
            runs, attention, labels = self._held
            self._held = runs[:, list(places)], attention[:, list(places)], labels[:, list(places)]

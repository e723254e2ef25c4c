"""How the low-rank weights of a `Pupil` are trained: the loop, and when it stops.

All that is random comes from one seed, drawn on the CPU.

Shapes: N pictures, M held-out pictures, B rows of a batch, C h w channels, height and width of latents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from featstore.errors import FeatstoreError
from featstore.pipelines.lora_plan import TrainLoraConfig
from featstore.pipelines.lora_pupil import Pupil
from featstore.pipelines.progress import Progress

LOOKS, LOOK_EVERY = 12, 10
"""How often, at most, the loss on held-out pictures is looked at, and the steps between, at least."""
PATIENCE = 3
"""Looks without a lower loss on held-out pictures after which training stops."""

_CLIP_NORM = 1.0
_WEIGHT_DECAY = 0.01
_SHOWN_OVER = 50


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How a training went."""

    steps: int
    """Steps taken."""
    kept_step: int
    """Step whose weights were kept: the last, or that with the lowest loss on held-out pictures."""
    before: float
    """Loss on the training pictures with the plain prompt before, see `Pupil.mean_loss`."""
    after: float
    """The same with the weights that were kept."""
    held_out_before: float | None
    """The same on held-out pictures; None: there are none."""
    held_out_after: float | None
    """The same with the weights that were kept."""
    history: tuple[dict[str, float], ...]
    """Now and then: ``step``, ``loss`` (mean since the last entry), ``held_out`` where it was looked at."""


class Training:
    """One training of a pupil.

    Args:
        pupil: the model.
        latents: (N, C, h, w) of the pictures, on the model's device.
        texts: N texts.
        held_out: (M, C, h, w) of other pictures, which are never trained on; None: there are none.
        plain_prompt: text that losses are measured with, as the technique ``lora`` feeds it.
        config: rates, schedule, rows of a step, and seed.
    """

    def __init__(
        self,
        pupil: Pupil,
        latents: Tensor,
        texts: Sequence[str],
        held_out: Tensor | None,
        *,
        plain_prompt: str,
        config: TrainLoraConfig,
    ) -> None:
        self._pupil, self._latents, self._texts, self._held_out = pupil, latents, texts, held_out
        self._plain_prompt, self._config = plain_prompt, config
        self._rng = torch.Generator("cpu").manual_seed(config.seed)
        self._losses: list[float] = []
        self._history: list[dict[str, float]] = []
        self._best: tuple[float, int, list[Tensor]] | None = None

    def run(self, steps: int, progress: Progress, *, stop_early: bool) -> Course:
        """Train, and leave those weights in the pupil that are to be kept, rounded to half precision.

        Args:
            steps: at most.
            progress: told of each step.
            stop_early: whether a loss on held-out pictures that no longer falls ends it; its lowest is kept then.

        Raises:
            FeatstoreError: if the loss is no longer finite.
        """
        stop_early = stop_early and self._held_out is not None
        look_every = max(LOOK_EVERY, math.ceil(steps / LOOKS))
        before, held_out_before = self._measure(self._latents), self._measure_held_out()
        step = 0
        for step in self._steps(steps, progress):
            if step % look_every and step != steps:
                continue
            self._look(step, look=stop_early)
            if self._best is not None and step - self._best[1] >= PATIENCE * look_every:
                break
        progress.stop()
        kept_step = self._keep(step)
        return Course(
            steps=step,
            kept_step=kept_step,
            before=before,
            after=self._measure(self._latents),
            held_out_before=held_out_before,
            held_out_after=self._measure_held_out(),
            history=tuple(self._history),
        )

    def _steps(self, steps: int, progress: Progress) -> Iterator[int]:
        """Take steps, and give the number of each."""
        config, pupil, parameters = self._config, self._pupil, self._pupil.all_parameters
        rates = {name: config.learning_rate if name == "unet" else config.text_learning_rate for name in pupil.modules}
        optimizer = torch.optim.AdamW(
            [{"params": pupil.parameters(name), "lr": rate} for name, rate in rates.items()],
            weight_decay=_WEIGHT_DECAY,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _factor(config.schedule, steps))
        batches = _batches(len(self._latents), config.batch_size, self._rng)
        progress.start("train", steps, "steps")
        for step in range(1, steps + 1):
            loss = self._loss(next(batches))
            self._losses.append(loss.item())
            if not math.isfinite(self._losses[-1]):
                raise FeatstoreError(
                    f"the loss is {self._losses[-1]} at step {step}; nothing was written",
                    hint="try a lower --learning-rate",
                )
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, _CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            progress.describe(f"train, loss {_mean(self._losses[-_SHOWN_OVER:]):.4f}")
            progress.advance()
            yield step

    def _loss(self, rows: list[int]) -> Tensor:
        noise = torch.randn((len(rows), *self._latents.shape[1:]), generator=self._rng)
        timesteps = torch.randint(self._pupil.backbone.timesteps, (len(rows),), generator=self._rng)
        return self._pupil.loss(self._latents[rows], noise, timesteps, [self._texts[row] for row in rows]).mean()

    def _look(self, step: int, *, look: bool) -> None:
        since = self._losses[int(self._history[-1]["step"]) if self._history else 0 :]
        self._history.append({"step": step, "loss": _mean(since)})
        held_out = self._measure_held_out() if look else None
        if held_out is None:
            return
        self._history[-1]["held_out"] = held_out
        if self._best is None or held_out < self._best[0]:
            self._best = held_out, step, [parameter.detach().clone() for parameter in self._pupil.all_parameters]

    def _keep(self, step: int) -> int:
        """Put the weights in place that are kept, and return the step that they are from."""
        parameters = self._pupil.all_parameters
        step, values = (step, parameters) if self._best is None else self._best[1:]
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                # As it will be written, so that what is measured is what is kept.
                parameter.copy_(value.to(torch.float16).to(parameter.dtype))
        return step

    def _measure(self, rows: Tensor) -> float:
        return self._pupil.mean_loss(rows, self._plain_prompt, seed=self._config.seed)

    def _measure_held_out(self) -> float | None:
        return None if self._held_out is None else self._measure(self._held_out)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _factor(schedule: str, steps: int) -> Callable[[int], float]:
    """Factor on the rates at each step, from 0 on."""
    if schedule == "cosine":
        return lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step / steps, 1.0)))
    return lambda _: 1.0


def _batches(count: int, size: int, rng: torch.Generator) -> Iterator[list[int]]:
    """Rows of one step after the other: every picture once before one comes again."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=rng).tolist()
        yield waiting[:size]
        del waiting[:size]


@contextlib.contextmanager
def repeatable(device: str) -> Iterator[None]:
    """Context in which a CUDA device computes the same bytes again; a CPU always does."""
    if not device.startswith("cuda"):
        yield
        return
    # Read when CUDA's matrix library starts, which is after this in a program that trains.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


class Once(logging.Filter):
    """Lets each message pass once: a prompt that is cut is encoded at every step."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new

"""What a gate is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import featstore.techniques
from featstore.errors import BadRequestError
from featstore.recipe import TRAIN_TIMESTEPS
from featstore.techniques import SteeringOptions, Technique

ANCHOR_TIMESTEP = 501
"""Where the anchor's features are taken unless its expression says so."""
MIN_IMAGES = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """What the user asked to judge."""

    dataset: str
    """Name of a known data set, or ``folder:PATH``."""
    techniques: str
    """Technique expression; ``basic`` is judged beside them in any case."""
    model: str | None = None
    """Model name or path of a diffusers folder; None: the data set's default."""
    timesteps: tuple[int, ...] = (50,)
    """Where features are judged."""
    anchor: str = f"basic@{ANCHOR_TIMESTEP}"
    """Feature with stronger shift, at which the score is 0: ``TECHNIQUE@T``, ``TECHNIQUE`` (at t = 501) or ``T``
    (of ``basic``)."""
    layers: str | None = None
    """Presets and layer names to judge; None: the model's default preset without its attention layers, whose channels
    are the tokens of each technique's own prompt."""
    image_size_px: int | tuple[int, int] | None = None
    """As of an extraction."""
    split: str | None = None
    """Only this split's images; None: all."""
    limit: int = 16
    """Images, evenly spaced over the data set's order."""
    strength: float = 0.8
    """How far Img2Img noises the input: 1 leaves nothing of it."""
    steps: int = 20
    """Denoising steps of a whole schedule, of which Img2Img takes the last ``strength``."""
    steering: SteeringOptions = dataclasses.field(default_factory=SteeringOptions)
    """What is asked of all techniques: texts and scales."""
    device: str | None = None
    """``cpu``, ``cuda``, ``cuda:1``..; None: a GPU where there is one."""
    seed: int = 0
    """Seed of the noise, the bootstrap and the test."""
    data_root: Path | None = None
    """Where data sets lie; None: ``$FEATSTORE_DATA``, else ``./data``."""
    dataset_name: str | None = None
    """Name that the data set's LoRAs are found by; None: the data set's own."""
    out: Path | None = None
    """Folder of ``gate.json`` and ``gate.png``; None: neither is written."""
    misled: bool = False
    """Let ControlNets and IP-Adapters see the next image of the sample in place of the own one: techniques that cannot
    help, to try the gate itself on."""

    def __post_init__(self) -> None:
        """Refuse values that need nothing else to be known wrong."""
        if self.limit < MIN_IMAGES:
            raise BadRequestError(f"--limit {self.limit} is not {MIN_IMAGES} or more: intervals are over images")
        if not 0 < self.strength <= 1:
            raise BadRequestError(f"--strength {self.strength:g} is not above 0 and at most 1")
        if self.steps < 1 or int(self.steps * self.strength) < 1:
            raise BadRequestError(
                f"--steps {self.steps} at --strength {self.strength:g} leaves Img2Img no step", hint="as in --steps 20"
            )
        if len(set(self.timesteps)) != len(self.timesteps):
            raise BadRequestError(f"a timestep is listed twice: {', '.join(map(str, self.timesteps))}")
        if 0 in self.timesteps:
            raise BadRequestError("--timesteps 0 is what features are compared with", hint="as in --timesteps 50")
        technique, timestep = self.anchor_parts
        if technique.expression == "basic" and timestep == 0:
            raise BadRequestError(
                f"--anchor {self.anchor} is what features are compared with, and has no content shift",
                hint="take one at a larger timestep, such as basic@501",
            )

    @property
    def anchor_parts(self) -> tuple[Technique, int]:
        """The anchor's technique and timestep.

        Raises:
            BadRequestError: if it is not one pass, or no timestep.
        """
        text = self.anchor.strip()
        before, at, after = text.rpartition("@")
        if text.isdecimal():
            before, after = "basic", text
        elif not at or not after.isdecimal():
            before, after = text, str(ANCHOR_TIMESTEP)
        passes = featstore.techniques.parse(before)
        if len(passes) != 1:
            raise BadRequestError(
                f"--anchor {self.anchor!r} is {len(passes)} passes; it is one", hint="as in --anchor basic@501"
            )
        if int(after) >= TRAIN_TIMESTEPS:
            raise BadRequestError(f"--anchor {self.anchor!r}: timestep {after} is outside 0..{TRAIN_TIMESTEPS - 1}")
        return passes[0], int(after)

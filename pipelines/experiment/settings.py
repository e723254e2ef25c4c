"""What an experiment is once it has been read: settings, and what is compared with what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from featstore.pipelines.recipe_file import Extraction, HeadTraining

SETTING = "setting"
"""Name of the axis that the settings of a list stand on."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One head to be trained, and the features that it reads."""

    name: str
    axes: Mapping[str, str]
    """Where it stands on each axis, as the file writes that."""
    dataset: str
    seed: int | None
    """Of noise, splits and initial weights; None: that of the whole experiment."""
    extract: Extraction
    head: HeadTraining


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One ``[[compare]]``: two settings, or all along an axis with the one that is named."""

    along: str | None = None
    to: str | None = None
    a: str | None = None
    b: str | None = None
    metric: str | None = None
    """None: the task's first."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """``[correlate]``: how well the content-shift score of stored features foretells what a technique gains."""

    to: str
    """Technique that gains are over, at the same place on all other axes."""
    reference: int = 0
    """Timestep at which that technique's features are taken for those of the image itself."""
    anchor: int = 501
    """Timestep at which they have a score of 0."""
    metric: str | None = None
    """None: the task's first."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentFile:
    """An experiment."""

    name: str
    title: str
    question: str = ""
    model: str | None = None
    axes: tuple[str, ...]
    settings: tuple[Setting, ...]
    compare: tuple[Comparison, ...] = ()
    correlate: Correlation | None = None

    def pairs(self) -> list[tuple[Setting, Setting, str | None]]:
        """What is compared: setting, the one that it is compared with, metric."""
        named = {one.name: one for one in self.settings}
        found = []
        for asked in self.compare:
            if asked.along is None:
                found.append((named[asked.a or ""], named[asked.b or ""], asked.metric))
                continue
            for one in self.settings:
                other = self.partner(one, asked.along, asked.to or "")
                if other is not None and other is not one:
                    found.append((one, other, asked.metric))
        return found

    def partner(self, setting: Setting, along: str, to: str) -> Setting | None:
        """The setting that is at ``to`` on one axis and beside ``setting`` on all others."""
        wanted = {**setting.axes, along: to}
        return next((one for one in self.settings if one.axes == wanted), None)

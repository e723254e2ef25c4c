"""How a pipeline tells its caller how far it is, without knowing about terminals."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one long job; implementations draw it or drop it."""

    def start(self, title: str, total: int, unit: str) -> None:
        """A stage of ``total`` steps begins."""

    def advance(self, steps: int = 1) -> None:
        """``steps`` more steps of the current stage are done."""

    def describe(self, title: str) -> None:
        """Another title for the current stage, e.g. with a figure that changes."""

    def note(self, text: str) -> None:
        """One line that the user should see."""

    def stop(self) -> None:
        """The current stage is over."""


class Silent:
    """Drops everything; for tests and scripts."""

    def start(self, title: str, total: int, unit: str) -> None:
        """Drop it."""

    def advance(self, steps: int = 1) -> None:
        """Drop it."""

    def describe(self, title: str) -> None:
        """Drop it."""

    def note(self, text: str) -> None:
        """Drop it."""

    def stop(self) -> None:
        """Drop it."""

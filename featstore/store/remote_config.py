"""How patient a remote store is: three numbers, from the environment where the caller gives none."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Self

from featstore.errors import BadRequestError

_PREFIX = "FEATSTORE_REMOTE_"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RemoteConfig:
    """How requests to a remote store are made."""

    timeout_seconds: float = 20.0
    """A request on which nothing moves for as long is given up (``FEATSTORE_REMOTE_TIMEOUT_SECONDS``)."""
    retry_seconds: float = 120.0
    """No request is tried again once it has taken as long in all (``FEATSTORE_REMOTE_RETRY_SECONDS``)."""
    requests: int = 16
    """Requests under way at once in a process, for each store (``FEATSTORE_REMOTE_REQUESTS``)."""

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        if not (math.isfinite(self.timeout_seconds) and self.timeout_seconds > 0):
            raise BadRequestError(f"a timeout of {self.timeout_seconds} s; more than 0 is wanted")
        if not (math.isfinite(self.retry_seconds) and self.retry_seconds >= 0):
            raise BadRequestError(f"tries for {self.retry_seconds} s; 0 or more is wanted")
        if not 1 <= self.requests <= 256:
            raise BadRequestError(f"{self.requests} requests at once; 1 to 256 are possible")

    @classmethod
    def from_environment(cls) -> Self:
        """The configuration that ``FEATSTORE_REMOTE_*`` asks for.

        Raises:
            BadRequestError: for a value that is no number, or out of bounds.
        """
        given: dict[str, float] = {}
        for field in dataclasses.fields(cls):
            name = _PREFIX + field.name.upper()
            text = os.environ.get(name)
            if not text:
                continue
            try:
                given[field.name] = int(text) if field.name == "requests" else float(text)
            except ValueError:
                raise BadRequestError(f"{name}={text!r} is no number") from None
        return cls(**given)  # type: ignore[arg-type]

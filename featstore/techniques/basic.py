"""``basic``: the data set's plain prompt and no steering; what the others are compared with."""

from __future__ import annotations

from featstore.errors import BadRequestError
from featstore.techniques.base import Draft, Part, Request

TITLE = "no steering: the data set's plain prompt alone"
VARIANTS = ""
REPEATABLE = False
SCALED = False


def check(part: Part) -> None:
    """Refuse any variant."""
    if part.variant is not None:
        raise BadRequestError(f"technique 'basic' has no variants, got {str(part)!r}")


def apply(part: Part, request: Request, draft: Draft) -> None:
    """A draft begins as `basic`."""

"""``cfg``: classifier-free guidance; each pass is run with the text and without, and led away from the latter."""

from __future__ import annotations

from featstore.errors import BadRequestError
from featstore.techniques.base import Draft, Part, Request

TITLE = "classifier-free guidance: features led from those of the empty text to those of the prompt, and beyond"
VARIANTS = ""
REPEATABLE = False
SCALED = False


def check(part: Part) -> None:
    """Refuse any variant."""
    if part.variant is not None:
        raise BadRequestError(
            f"technique 'cfg' has no variants, got {str(part)!r}", hint="its scale goes into --guidance-scale"
        )


def apply(part: Part, request: Request, draft: Draft) -> None:
    """Ask for guidance at the scale of the request."""
    draft.guidance = request.options.guidance_scale

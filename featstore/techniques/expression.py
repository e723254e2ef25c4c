"""The grammar of ``--techniques``: ``,`` lists passes, ``+`` combines in one, ``:`` gives a variant, ``@`` a scale."""

from __future__ import annotations

import math
import re

from featstore.errors import BadRequestError, unknown_name
from featstore.techniques.base import TECHNIQUES, Part, Technique, looks_like_path

_EXAMPLE = "example: basic,prompt,controlnet:canny@0.5+lora:./horse.safetensors"
_NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)", re.ASCII)


def parse(text: str) -> tuple[Technique, ...]:
    """The passes that an expression lists, in its order.

    Args:
        text: e.g. ``prompt,controlnet:canny@0.5+lora:./horse.safetensors``. Names are not case-sensitive, paths
            are. What follows the last ``@`` of a part is its scale if it is a plain decimal number, and part of the
            path if not: a path that ends so is written with its scale, ``./horse@2@1``.

    Raises:
        BadRequestError: for an unknown technique or variant, an empty place, a scale where none can be, or
            something asked for twice; the message says where.
    """
    passes: list[Technique] = []
    seen: dict[frozenset[Part], int] = {}
    at = 1
    for written in text.split(","):
        technique = _parse_pass(written, at, text)
        same = frozenset(technique.parts)
        if same in seen:
            raise _error(text, at, f"{technique.expression!r} is the same pass as at position {seen[same]}")
        seen[same] = at
        passes.append(technique)
        at += len(written) + 1
    return tuple(passes)


def _parse_pass(written: str, at: int, text: str) -> Technique:
    parts: list[Part] = []
    for piece in written.split("+"):
        part = _parse_part(piece, at, text)
        _check_beside(part, parts, at, text)
        parts.append(part)
        at += len(piece) + 1
    return Technique(expression="+".join(str(part) for part in parts), parts=tuple(parts))


def _parse_part(piece: str, at: int, text: str) -> Part:
    written, scale = _split_scale(piece.strip())
    name, colon, variant = (item.strip() for item in written.partition(":"))
    name = name.lower()
    if not name:
        raise _error(text, at, "a technique is missing")
    if name not in TECHNIQUES and name.partition("@")[0] in TECHNIQUES:
        raise _error(text, at, f"{name.partition('@')[2]!r} after the @ of {written!r} is no number")
    if name not in TECHNIQUES:
        error = unknown_name("technique", name, TECHNIQUES)
        raise BadRequestError(f"{error} (position {at} of {text!r})", hint=error.hint or _EXAMPLE)
    if colon and not variant:
        raise _error(text, at, f"there is nothing after the colon of {piece.strip()!r}")
    if variant and not looks_like_path(variant):
        variant = variant.lower()
    if scale is not None and not TECHNIQUES[name].SCALED:
        raise _error(text, at, f"technique {name!r} has no scale, got {piece.strip()!r}")
    if scale is not None and not math.isfinite(scale):
        raise _error(text, at, f"the scale of {written!r} is too large for a number")
    part = Part(name=name, variant=variant or None, scale=scale)
    TECHNIQUES[name].check(part)
    return part


def _split_scale(piece: str) -> tuple[str, float | None]:
    """A part without its scale, and the scale; None: it has none."""
    before, at, after = piece.rpartition("@")
    if not at or not _NUMBER.fullmatch(after.strip()):
        return piece, None
    # Adding zero makes -0 zero, so that equal scales are written alike.
    return before.strip(), float(after) + 0.0


def _check_beside(part: Part, parts: list[Part], at: int, text: str) -> None:
    """Refuse combinations that mean nothing."""
    if parts and "basic" in (part.name, parts[0].name):
        raise _error(text, at, "'basic' is the absence of steering and combines with nothing")
    for other in parts:
        if (other.name, other.variant) == (part.name, part.variant):
            raise _error(text, at, f"{str(part)!r} is twice in one pass")
        if other.name == part.name and not TECHNIQUES[part.name].REPEATABLE:
            raise _error(text, at, f"{str(other)!r} and {str(part)!r} exclude each other in one pass")


def _error(text: str, at: int, what: str) -> BadRequestError:
    return BadRequestError(f"{what} (position {at} of {text!r})", hint=_EXAMPLE)

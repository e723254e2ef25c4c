"""JSON that others wrote: read with a limit, and taken for what it is only after looking."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featstore.errors import BadRequestError, NotFoundError

_MAX_BYTES = 64 << 20
_METRICS = {"miou": "mIoU", "macc": "mAcc"}


def read_json(path: Path, *, what: str, hint: str) -> Mapping[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        what: what it is called in messages, e.g. ``gate``.
        hint: the command that makes such a file.

    Raises:
        NotFoundError: if it is not there.
        BadRequestError: if it is too large, or holds no JSON object.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BadRequestError(f"{what} {str(path)!r} is larger than {_MAX_BYTES >> 20} MiB", hint=hint)
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise NotFoundError(f"cannot read {what} {str(path)!r}: {error.strerror}", hint=hint) from None
    except (ValueError, RecursionError):
        raise BadRequestError(f"{what} {str(path)!r} holds no JSON", hint=hint) from None
    if not isinstance(value, dict):
        raise BadRequestError(f"{what} {str(path)!r} holds no JSON object", hint=hint)
    return value


def objects(value: object) -> list[Mapping[str, Any]]:
    """The objects in a JSON list; none where there is no list."""
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def mapping(value: object) -> Mapping[str, Any]:
    """A JSON object, empty where there is another thing."""
    return value if isinstance(value, dict) else {}


def number(value: object) -> float | None:
    """A finite JSON number, None where there is another thing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def interval(value: object) -> tuple[float | None, float | None]:
    """The two ends ``[low, high]``, (None, None) where there is another thing."""
    if not isinstance(value, list) or len(value) != 2:
        return None, None
    low, high = number(value[0]), number(value[1])
    return (None, None) if low is None or high is None else (low, high)


def words(value: object) -> str:
    """Anything as a short text: strings as they are, truth as yes and no, nothing as a dash, the rest as JSON."""
    if isinstance(value, str):
        return value
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def metric_name(key: str) -> str:
    """How the field writes a metric, e.g. ``mIoU`` for ``miou``; the key itself where it is written so."""
    return _METRICS.get(key, key)


def pretty(value: object) -> str:
    """JSON for people, over many lines."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)

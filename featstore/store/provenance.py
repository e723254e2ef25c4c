"""Who made the layers of a run, when, with which versions and on what: a list of entries in the run's document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]
"""Plain JSON; ``layers`` names what the entry is about."""


def joined(before: Sequence[Entry], coming: Iterable[Entry], layers: Sequence[str]) -> list[Entry]:
    """``before`` and those of ``coming`` that say something new about ``layers``.

    An entry that is there already, for some of its layers or all, is not told again for them.
    """
    after = list(before)
    for entry in coming:
        about = _about(entry)
        told = [one for one in after if _rest(one) == _rest(entry)]
        rest = [name for name in about if name in layers and not any(name in _about(one) for one in told)]
        if rest or (not about and not told):
            after.append({**entry, "layers": sorted(rest)})
    return after


def _about(entry: Entry) -> Sequence[str]:
    layers = entry.get("layers")
    return layers if isinstance(layers, list | tuple) else ()


def _rest(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "layers"}

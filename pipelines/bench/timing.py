"""Timing of two sides in turn, and of commands in processes of their own."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from featstore.errors import FeatstoreError


def in_turn(repeat: int, *sides: Callable[[], object]) -> tuple[float, ...]:
    """Seconds of each side; who goes first changes with every repeat."""
    order = [(place + repeat) % len(sides) for place in range(len(sides))]
    measured = {place: seconds(sides[place]) for place in order}
    return tuple(measured[place] for place in range(len(sides)))


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock seconds of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def command(*words: str) -> Any:
    """What a command of featstore prints with ``--json``, run in a process of its own.

    Raises:
        FeatstoreError: if it fails.
    """
    line = [sys.executable, "-m", "featstore.cli", *words, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FeatstoreError(f"{shlex.join(line)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)

"""Who made something, when, where, and with which versions: for people, never part of an identity."""

from __future__ import annotations

import contextlib
import datetime
import getpass
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def provenance(packages: Sequence[str], **more: Any) -> dict[str, Any]:
    """Versions of ``packages`` and Python, host, user and time, with ``more`` plain JSON."""
    return {
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "host": platform.node(),
        "user": _user(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
    }


def cpu_name() -> str:
    """Model of this machine's processor as its system calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user in a container
        return "unknown"

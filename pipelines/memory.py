"""Memory that this process takes."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far.

    Not `resource.getrusage` where there is another way: on Linux a program begins with the largest set of the process
    that started it (measured: a child of one that held 3 GB reported 3 GB).
    """
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rss_bytes() -> int:
    """Resident set of this process now; its largest so far where the system does not say."""
    now = _status("VmRSS")
    return peak_rss_bytes() if now is None else now


def _status(name: str) -> int | None:
    """A line of what Linux says of this process, in bytes."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024

"""Names of unfinished files, and when one that was left behind may be deleted.

A write goes to ``<store>/.featstore/<place>-<pid>-<start>-<number>.partial`` and is renamed from
there. A writer that is killed leaves its file; nothing ever reads one, so it only costs space. The
next opening for writing deletes those that no living writer can own:

- ``place`` names machine, boot and process namespace. Where it is ours, the process id can be asked
  about: a file goes when that process is gone, or when the id now belongs to a process that started
  at another time. A living process's file stays however old it is (it may be suspended).
- Anywhere else (another machine on a shared file system, another container, before a reboot) a
  process id says nothing, so age decides: a shard is written in seconds, and after a day without a
  change nobody is writing it. Deleting wrongly would still be harmless to what is stored: the
  rename of that writer fails, and its block stays uncommitted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import re
import socket
import time
from pathlib import Path

SUFFIX = ".partial"
FOREIGN_MAX_AGE_SECONDS = 24 * 3600.0
"""Age after which an unfinished file of another machine, container or boot is taken for abandoned."""

_NAME = re.compile(r"([0-9a-f]{12})-(\d+)-(\d+)-\d+\.partial")
_numbers = itertools.count()


def _text(path: str) -> str:
    """Content of a small file of the kernel's; empty where there is none (macOS)."""
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


@functools.cache
def place() -> str:
    """12 hex digits that name this machine, boot and process namespace."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    identity = "\n".join([socket.gethostname(), _text("/proc/sys/kernel/random/boot_id").strip(), namespace])
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def started(pid: int) -> int:
    """When process ``pid`` started, in the kernel's ticks since boot; 0 where that is not known."""
    fields = _fields(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def _fields(pid: int) -> list[str]:
    """What the kernel says of a process, from its state on; empty where it says nothing."""
    # The second field, the command's name, may hold spaces and brackets: count from its last bracket.
    return _text(f"/proc/{pid}/stat").rpartition(")")[2].split()


@functools.lru_cache(maxsize=1)
def _own_start(pid: int) -> int:
    return started(pid)


def new_name() -> str:
    """A name for an unfinished file that no other write has, and that tells who writes it."""
    pid = os.getpid()
    return f"{place()}-{pid}-{_own_start(pid)}-{next(_numbers)}{SUFFIX}"


def abandoned(name: str, age_seconds: float) -> bool:
    """Whether no living writer can own the unfinished file ``name``, last changed ``age_seconds`` ago."""
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    if match[1] != place():
        return age_seconds > FOREIGN_MAX_AGE_SECONDS
    return not lives(int(match[2]), int(match[3]))


def lives(pid: int, start: int) -> bool:
    """Whether process ``pid`` of this `place` that started at ``start`` (`started`; 0: not known) is still there."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # It lives, under another user.
    if _fields(pid)[:1] in (["Z"], ["X"]):
        return False  # It has ended, and its parent has not asked how.
    return start == 0 or started(pid) in (0, start)


def sweep(folder: Path) -> list[str]:
    """Delete the abandoned unfinished files in ``folder``; returns their names.

    What cannot be looked at or deleted is left: this is housekeeping, and no reason to fail.
    """
    gone = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if abandoned(entry.name, time.time() - entry.stat(follow_symlinks=False).st_mtime):
                    Path(entry.path).unlink()
                    gone.append(entry.name)
    return gone

"""What a worker says of itself. Sent to workers by value: nothing of featstore need be installed there."""

import importlib.metadata
import os
import platform
import socket


def facts(packages):  # type: ignore[no-untyped-def]
    """Versions, host and cores of the process that this runs in, as plain JSON.

    Args:
        packages: names of installed packages.
    """
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "packages": versions,
        "host": socket.gethostname(),
        "cores": cores,
        "pid": os.getpid(),
    }

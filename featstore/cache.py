"""Small facts that are slow to find out again (digests), kept in the user's cache folder.

Every entry is a file of its own, published atomically and checked when read. Whatever is wrong with
it (damaged, of another version, unwritable folder) only costs the time to find the facts out again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from featstore.whole_file import write_whole


def cache_folder() -> Path:
    """The user's cache folder: ``$XDG_CACHE_HOME/featstore``, else ``~/.cache/featstore``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "featstore"


def _file(kind: str, identity: str) -> Path:
    return cache_folder() / kind / f"{hashlib.sha256(identity.encode('utf-8', 'surrogateescape')).hexdigest()}.json"


def load(kind: str, identity: str) -> Any | None:
    """What `save` kept under this identity (plain JSON); None if nothing is there or it is damaged."""
    try:
        document = json.loads(_file(kind, identity).read_bytes())
        body = document["body"]
        whole = hashlib.sha256(body.encode()).hexdigest() == document["sha256"]
        return json.loads(body) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def save(kind: str, identity: str, value: Any) -> bool:
    """Keep ``value`` (plain JSON) under this identity; returns whether that worked."""
    path = _file(kind, identity)
    body = json.dumps(value)
    document = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, document, durable=False)
    except (OSError, RuntimeError):
        return False
    return True

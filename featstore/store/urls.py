"""From the URL of a store to the objects that lie there."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from featstore.errors import BadRequestError
from featstore.store.local import LocalObjects
from featstore.store.objects import Objects


def objects_at(url: str | Path) -> Objects:
    """The objects of the store at ``url``; nothing is asked of the place yet.

    Args:
        url: a path or ``file://`` URL.

    Raises:
        BadRequestError: for another scheme.
    """
    return LocalObjects(local_path(url))


def local_path(url: str | Path) -> Path:
    """The folder that ``url`` names: a path, absolute or relative, or ``file://``.

    Raises:
        BadRequestError: for another scheme.
    """
    text = str(url)
    if not text:
        raise BadRequestError("an empty store URL", hint="name a folder, e.g. --store ./features.zarr")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if isinstance(url, Path) or scheme is None:
        return Path(text).expanduser().absolute()
    parts = urlsplit(text)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise BadRequestError(
            f"store URL {text!r} has scheme {parts.scheme}://; supported are local paths and file:///path",
            hint="give the path of a folder",
        )
    return Path(unquote(parts.path))

"""From the URL of a store to the objects that lie there: the one place that knows schemes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from urllib.parse import unquote, urlsplit

from featstore.errors import BadRequestError, unknown_name
from featstore.store.local import LocalObjects
from featstore.store.objects import Objects

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOST_SLASH = re.compile(r"(s3a?|gs|az|azure|https?|memory|file):/(?!/)")
"""What becomes of a URL that somebody made a `Path` of."""
_EXAMPLES = {
    "s3": "s3://bucket/path",
    "gs": "gs://bucket/path",
    "az": "az://container/path",
    "http": "http://host:port/path",
    "https": "https://host/path",
    "memory": "memory://name",
}
_CREDENTIALS_HINT = "credentials come from the environment: AWS_*, GOOGLE_*, AZURE_*, and FEATSTORE_TOKEN for http"


def _local(url: str) -> Objects:
    return LocalObjects(local_path(url))


def _remote(url: str) -> Objects:
    # Where a store is a folder, nothing of this is needed.
    from featstore.store.remote import RemoteObjects

    return RemoteObjects(remote_url(url))


SCHEMES: Mapping[str, Callable[[str], Objects]] = MappingProxyType(
    {"file": _local, **dict.fromkeys(_EXAMPLES, _remote)}
)
"""What makes the objects of a URL, by its scheme."""
_ALIASES = {"s3a": "s3", "azure": "az"}


def objects_at(url: str | Path) -> Objects:
    """The objects of the store at ``url``; nothing is asked of the place yet.

    Args:
        url: a path, or a URL: ``file:///path``, ``s3://bucket/path``, ``gs://bucket/path``, ``az://container/path``,
            ``http(s)://host/path`` (read-only), or ``memory://name``, which lasts as long as this process.

    Raises:
        BadRequestError: for another scheme, or a URL that names no place.
    """
    if lost := _LOST_SLASH.match(str(url)):
        raise BadRequestError(
            f"store URL {str(url)!r} has lost a slash", hint=f"{lost[1]}://..; a URL is text, and never a Path"
        )
    scheme = None if isinstance(url, Path) else scheme_of(url)
    return _local(str(url)) if scheme is None else SCHEMES[scheme](str(url))


def scheme_of(url: str) -> str | None:
    """Scheme of ``url``, lower-case and without aliases; None for a path.

    Raises:
        BadRequestError: for one that is not known.
    """
    match = _SCHEME.match(url)
    if match is None:
        return None
    scheme = match[1].lower()
    scheme = _ALIASES.get(scheme, scheme)
    if scheme not in SCHEMES:
        raise unknown_name("store scheme", f"{scheme}://", [f"{known}://" for known in SCHEMES])
    return scheme


def is_remote(url: str | Path) -> bool:
    """Whether ``url`` names a place other than a folder of this machine; errors of `scheme_of`."""
    return not isinstance(url, Path) and scheme_of(url) not in (None, "file")


def remote_url(url: str) -> str:
    """``url`` of a remote store as it is always written: known scheme, no slash at the end.

    Raises:
        BadRequestError: if it names no place, or says more than a place.
    """
    scheme = scheme_of(url)
    rest = url.partition("://")[2].rstrip("/")
    root, _, path = rest.partition("/")
    example = _EXAMPLES[scheme or ""]
    if "@" in root:
        # Not quoted: it may be a password.
        raise BadRequestError(f"a store URL of scheme {scheme}:// with user or password", hint=_CREDENTIALS_HINT)
    if "?" in rest or "#" in rest:
        raise BadRequestError(f"store URL {url.partition('?')[0]!r} has a query or fragment", hint=f"as in {example}")
    parts = path.split("/") if path else []
    if not root or any(unquote(part) in ("", ".", "..") for part in parts):
        raise BadRequestError(f"store URL {url!r} names no place", hint=f"as in {example}")
    if re.search(r"[\s\x00-\x1f\x7f]", root):
        raise BadRequestError(f"store URL {url!r} has spaces in its first part", hint=f"as in {example}")
    return f"{scheme}://{root.lower() if scheme in ('http', 'https') else root}" + (f"/{path}" if path else "")


def local_path(url: str | Path) -> Path:
    """The folder that ``url`` names: a path, absolute or relative, or ``file://``.

    Raises:
        BadRequestError: for another scheme.
    """
    text = str(url)
    if not text:
        raise BadRequestError("an empty store URL", hint="name a folder, e.g. --store ./features.zarr")
    if isinstance(url, Path) or _SCHEME.match(text) is None:
        return Path(text).expanduser().absolute()
    parts = urlsplit(text)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise BadRequestError(f"{text!r} is no folder of this machine", hint="give the path of a folder")
    return Path(unquote(parts.path))

"""Clients of obstore for a place, made from the usual environment variables."""

from __future__ import annotations

import enum
import os
import re
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, HTTPStore, MemoryStore, S3Store

from featstore.errors import BadRequestError, StorageError
from featstore.store.aws_profile import profile_settings
from featstore.store.remote_config import RemoteConfig
from featstore.store.remote_errors import diagnose

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

PREFIXES = ("AWS_", "GOOGLE_", "AZURE_", "FEATSTORE_TOKEN")
"""Beginnings of the environment variables that a client is made from."""
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_CONNECT_SECONDS = 5.0
_WHOLE_FACTOR = 15
"""Time that a whole request may take, in timeouts: for 8 MiB within 300 s, 28 kB/s are enough."""
_PART_RETRIES = 6
_MAX_BACKOFF_SECONDS = 10

_memory: dict[str, MemoryStore] = {}
_memory_lock = threading.Lock()


def environment() -> dict[str, str]:
    """The variables that a client is made from."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}


def endpoint(scheme: str, variables: Mapping[str, str]) -> str | None:
    """The server that the environment names in the place of the provider's own."""
    return next((variables[name] for name in _ENDPOINTS.get(scheme, ()) if variables.get(name)), None)


class Use(enum.Enum):
    """What a client is for."""

    QUICK = enum.auto()
    """Requests on which something always moves: a server that is silent for a timeout is given up."""
    SLOW = enum.auto()
    """Large uploads: the server is silent until it has them whole."""
    PARTS = enum.auto()
    """Uploads in parts, each of which is repeated by itself, so that one that failed does not cost all the others."""


def make_client(scheme: str, root: str, config: RemoteConfig, variables: Mapping[str, str], use: Use) -> ObjectStore:
    """A client of obstore for a bucket, container or server.

    But for parts of uploads it repeats nothing by itself; `remote_connection` says why.

    Args:
        scheme: ``s3``, ``gs``, ``az``, ``http``, ``https`` or ``memory``.
        root: bucket, container, URL of a server, or name in memory.
        config: how patient it is.
        variables: of the environment.
        use: what it is for.

    Raises:
        BadRequestError: for an endpoint that is no URL.
        StorageError: if credentials or settings are missing or make no sense.
    """
    if scheme == "memory":
        with _memory_lock:
            return _memory.setdefault(root, MemoryStore())
    settings, options = _settings(scheme, root, config, variables)
    if use is Use.QUICK:
        options["read_timeout"] = timedelta(seconds=config.timeout_seconds)
    retries: RetryConfig = {"max_retries": 0}
    if use is Use.PARTS:
        retries = {
            "max_retries": _PART_RETRIES,
            "retry_timeout": timedelta(seconds=config.retry_seconds),
            "backoff": {"max_backoff": timedelta(seconds=_MAX_BACKOFF_SECONDS)},
        }
    try:
        if scheme == "s3":
            return S3Store(root, client_options=options, retry_config=retries, **settings)
        if scheme == "gs":
            return GCSStore(root, client_options=options, retry_config=retries, **settings)
        if scheme == "az":
            return AzureStore(root, client_options=options, retry_config=retries, **settings)
        return HTTPStore(root, client_options=options, retry_config=retries)
    except (BaseError, OSError, ValueError) as error:
        cause = diagnose(error, scheme, root)
        place = root if "://" in root else f"{scheme}://{root}"
        raise StorageError(f"cannot reach {place!r}: {cause.text}", hint=cause.hint) from None


def _settings(
    scheme: str, root: str, config: RemoteConfig, variables: Mapping[str, str]
) -> tuple[dict[str, Any], ClientConfig]:
    """Settings for obstore, of the provider and of the connection."""
    settings: dict[str, Any] = {}
    options: ClientConfig = {
        "connect_timeout": timedelta(seconds=min(_CONNECT_SECONDS, config.timeout_seconds)),
        "timeout": timedelta(seconds=config.timeout_seconds * _WHOLE_FACTOR),
    }
    server = endpoint(scheme, variables)
    if scheme == "s3":
        settings = dict(profile_settings(variables))
        server = server or settings.get("endpoint")
        # Deleting in bulk is what compatible servers lack most often, and one object is deleted at a time here.
        settings["disable_bulk_delete"] = True
    elif scheme in ("http", "https"):
        server = root
        if token := variables.get("FEATSTORE_TOKEN"):
            options["default_headers"] = {"Authorization": f"Bearer {token}"}
    if server is not None and re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", server) is None:
        raise BadRequestError(f"endpoint {server!r} is no URL", hint="as in AWS_ENDPOINT_URL=https://minio.lan:9000")
    # Who names a server by http:// means it.
    options["allow_http"] = server is not None and server.startswith("http://")
    if scheme == "s3" and server is not None:
        settings["endpoint"] = server.rstrip("/")
    if scheme == "s3" and (bundle := variables.get("AWS_CA_BUNDLE")) and not options["allow_http"]:
        options["root_certificate"] = _certificate(bundle)
    return settings, options


def _certificate(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read the certificates in {path!r}: {error}", hint="correct AWS_CA_BUNDLE") from None

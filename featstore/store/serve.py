"""A local store shared over HTTP, read-only: the ASGI application behind `featstore serve`.

What a client may name is spelled by a narrow alphabet and looked for below the store's folder only, so
a request can reach nothing else, whatever it is made of. Every request opens its object once and is
answered from that open file: a writer that replaces the object meanwhile changes neither the bytes of
the answer nor their ETag, which is how readers elsewhere tell that it was replaced (If-Match).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import hmac
import html
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from featstore.errors import FeatstoreError
from featstore.store.catalog import describe
from featstore.store.store import Store

_log = logging.getLogger(__name__)

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._~-]{0,254}")
"""One level of a key that is served: what `layout` makes names of, so no "..", no hidden file, no NUL."""
_INDEX_SECONDS = 60.0
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENXIO)
_HEADERS = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
"""An object may be replaced under its name, so whoever keeps a copy has to ask whether it is still the same."""
_PAGE_HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'", **_HEADERS}


class _ObjectResponse(FileResponse):
    chunk_size = 1 << 20


def application(
    root: Path,
    *,
    page: Callable[[], str],
    token: str | None = None,
    hosts: Collection[str] | None = None,
    aside: Mapping[str, bytes] | None = None,
) -> ASGIApp:
    """The application that serves the objects below ``root`` to GET and HEAD, with ranges.

    Args:
        root: folder of the store.
        page: makes the HTML of the page at ``/``.
        token: what a client has to present, as a bearer token or as the password of HTTP basic
            authentication under any name; None: nothing.
        hosts: names that the server may be called by, lower case; None: any. A server for this machine alone
            has to give them, or a page in its user's browser can reach it under a name of its own (DNS rebinding).
        aside: objects by key that are served where the folder has none of that name.
    """
    resolved = root.resolve()
    kept = aside or {}

    async def serve_page(_: Request) -> Response:
        return HTMLResponse(await run_in_threadpool(page), headers=_PAGE_HEADERS)

    async def serve_object(scope: Scope, receive: Receive, send: Send) -> None:
        key = scope["path"].removeprefix("/")
        fd = await run_in_threadpool(_open, resolved, key)
        if fd is None:
            if key in kept:
                response: Response = Response(kept[key], media_type="application/json", headers=_HEADERS)
            else:
                response = PlainTextResponse("there is no such object\n", status_code=404)
            await response(scope, receive, send)
            return
        try:
            await _answer(fd, key, Headers(scope=scope))(scope, receive, send)
        finally:
            os.close(fd)

    app = Starlette(
        routes=[Route("/", serve_page), Route("/{key:path}", _Endpoint(serve_object), methods=["GET"])],
        middleware=[Middleware(_Guard, token=token, hosts=hosts)],
    )
    app.router.redirect_slashes = False
    return app


class _Endpoint:
    """An ASGI application as the endpoint of a route, which takes plain functions for something else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except OSError as error:
            _log.warning("%r: %s", scope["path"], error)
            with contextlib.suppress(
                RuntimeError
            ):  # The answer has begun: the connection is cut, which the client sees.
                await PlainTextResponse("the disk failed\n", status_code=500)(scope, receive, send)


def _open(root: Path, key: str) -> int | None:
    """A descriptor of the file ``key`` below ``root``; None if there is none that may be served."""
    if not all(_SEGMENT.fullmatch(part) for part in key.split("/")):
        return None
    try:
        path = (root / key).resolve(strict=True)
        # Links are followed, but only to what could have been asked for by name.
        if not path.is_relative_to(root) or not all(map(_SEGMENT.fullmatch, path.relative_to(root).parts)):
            return None
        # Not blocking: a named pipe would wait for its other end.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise
    except RuntimeError:  # links in a circle, as pathlib says it
        return None
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    return None


def _answer(fd: int, key: str, headers: Headers) -> Response:
    """The response to a GET or HEAD of the open file ``fd``."""
    status = os.fstat(fd)
    # A rename puts another inode in the place of the old one, so equal means the same bytes.
    etag = f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"'
    own = {"etag": etag, **_HEADERS}
    if (wanted := headers.get("if-match")) is not None and etag not in _tags(wanted) and wanted.strip() != "*":
        return PlainTextResponse("it has been replaced\n", status_code=412, headers=own)
    if (known := headers.get("if-none-match")) is not None and (
        known.strip() == "*" or etag in (tag.removeprefix("W/") for tag in _tags(known))
    ):
        return Response(status_code=304, headers=own)
    media_type = "application/json" if key.endswith(".json") else "application/octet-stream"
    # By its descriptor: the name may belong to another file by the time the response opens it.
    return _ObjectResponse(f"/dev/fd/{fd}", stat_result=status, media_type=media_type, headers=own)


def _tags(header: str) -> list[str]:
    """The entity tags of an If-Match or If-None-Match header; ours hold no commas."""
    return [tag.strip() for tag in header.split(",")]


class _Guard:
    """Passes on the requests that may be answered."""

    def __init__(self, app: ASGIApp, token: str | None, hosts: Collection[str] | None) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        called = re.sub(r":[0-9]*$", "", headers.get("host", "")).strip("[]").lower()
        answer: ASGIApp = self._app
        if self._hosts is not None and called and called not in self._hosts:
            answer = PlainTextResponse(f"this server is called {', '.join(sorted(self._hosts))}\n", status_code=421)
        elif self._token is not None and not hmac.compare_digest(_credentials(headers), self._token):
            text = "a token is needed: set FEATSTORE_TOKEN, or give it as the password\n"
            asked = {"www-authenticate": 'Basic realm="featstore", Bearer realm="featstore"'}
            answer = PlainTextResponse(text, status_code=401, headers=asked)
        await answer(scope, receive, send)


def _credentials(headers: Headers) -> bytes:
    """The bearer token, or the password, that a request presents; empty if there is none."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")
    if scheme.lower() == "basic":
        with contextlib.suppress(binascii.Error, ValueError):
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    return b""


class IndexPage:
    """The page at ``/``: what the store holds, for people; made anew at most once a minute, however often asked for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._text, self._made = "", -_INDEX_SECONDS

    def __call__(self) -> str:
        """The HTML of the page."""
        with self._lock:
            if time.monotonic() - self._made >= _INDEX_SECONDS:
                self._text = index_page(self._store)
                self._made = time.monotonic()
            return self._text


def index_page(store: Store) -> str:
    """A page that says what ``store`` holds; everything that comes from the store is escaped."""
    parts = []
    try:
        for dataset in describe(store)["datasets"]:
            parts.append(f"<h2>{html.escape(dataset['name'])}: {dataset['images']:,} images</h2>")
            parts.append("<table><tr><th>model<th>technique<th>t<th>images<th>layers<th>MB<th>fingerprint")
            parts += [
                "<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in _cells(run)) for run in dataset["runs"]
            ]
            parts.append("</table>")
    except FeatstoreError as error:
        parts.append(f"<p>{html.escape(str(error))}")
    name = html.escape(Path(store.url).name)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>"
        "<style>body{font:1em sans-serif;margin:2em}td,th{text-align:left;padding:.1em 1em .1em 0}</style>"
        f"<h1>{name}</h1>{''.join(parts) or '<p>Nothing yet.'}"
        "<p>Read it with <code>featstore info --store URL</code>, URL being the address of this page.</html>"
    )


def _cells(run: Mapping[str, object]) -> list[object]:
    layers = run["layers"]
    assert isinstance(layers, dict)
    size_bytes = sum(layer["bytes"] for layer in layers.values())
    return [
        run["model"],
        run["technique"],
        run["timestep"],
        f"{run['committed']} of {run['images']}",
        len(layers),
        f"{size_bytes / 1e6:,.1f}",
        str(run["fingerprint"])[:8],
    ]

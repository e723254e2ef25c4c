"""The app on a port of this machine. Pages, scripts and pictures come from here alone; nothing is sent elsewhere."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import featstore.store
from featstore.errors import BadRequestError, NotFoundError
from featstore.pipelines.browse.shelf import Shelf


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BrowseConfig:
    """What to browse, and where."""

    store: str = "features.zarr"
    """URL of the store."""
    host: str = "127.0.0.1"
    """Address to listen at; other machines reach it only if it is no loopback address."""
    port: int = 8322
    """Port to listen at; 0: any that is free."""
    dataset: str | None = None
    """Where the images of a data set are, e.g. ``folder:PATH``; known ones are found by their name."""
    data_root: Path | None = None
    """Where data sets lie."""

    def __post_init__(self) -> None:
        """Refuse a port that cannot be."""
        if not 0 <= self.port <= 65535:
            raise BadRequestError(f"port {self.port} is outside 0..65535")


class Browsing:
    """The app, listening: `run` answers until it is stopped."""

    url: str
    """What is opened in a browser."""
    exposed: bool
    """Whether other machines reach it."""

    def __init__(self, config: BrowseConfig, server: Any, *, exposed: bool) -> None:
        self._server = server
        self.exposed = exposed
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.url = f"http://{host}:{server.port}/"

    def run(self, started: Callable[[], None] | None = None) -> None:
        """Answer until Ctrl-C (KeyboardInterrupt) or `stop`.

        Args:
            started: called once requests are answered.
        """
        self._server.start()
        if started is not None:
            self._server.io_loop.add_callback(started)
        try:
            self._server.io_loop.start()
        finally:
            self._server.stop()

    def stop(self) -> None:
        """Make `run` return, from another thread."""
        self._server.io_loop.add_callback(self._server.io_loop.stop)


def browse(config: BrowseConfig) -> Browsing:
    """Open a store and listen.

    Raises:
        NotFoundError: if there is no store, nothing in it, or the library that the app stands on is not installed.
        BadRequestError: for an address that cannot be listened at.
    """
    shelf = Shelf(featstore.store.open(config.store), dataset=config.dataset, data_root=config.data_root)
    try:
        from bokeh.application import Application
        from bokeh.application.handlers import FunctionHandler
        from bokeh.server.server import Server
    except ImportError:
        raise NotFoundError(
            "the browser stands on bokeh, which is not installed", hint="pip install 'featstore[browse]'"
        ) from None
    from featstore.pipelines.browse.page import Page

    logging.getLogger("bokeh").setLevel(logging.WARNING)
    pages = Application(FunctionHandler(lambda document: _make(Page, shelf, document)))
    listener, port = _free(config.host, config.port)
    listener.close()
    try:
        server = Server(
            {"/": pages}, address=config.host, port=port, allow_websocket_origin=_origins(config.host, port)
        )
    except OSError as error:
        raise _refused(config, error) from None
    return Browsing(config, server, exposed=not _is_local(config.host))


def _make(page: Callable[..., object], shelf: Shelf, document: Any) -> None:
    page(shelf, document)


def _free(host: str, port: int) -> tuple[socket.socket, int]:
    """A socket at ``host``, and its port: a free one for 0. Pages name the port, so it must be known before them."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise _refused(BrowseConfig(host=host, port=port), error) from None
    return listener, int(listener.getsockname()[1])


def _refused(config: BrowseConfig, error: Exception) -> BadRequestError:
    return BadRequestError(
        f"cannot listen at {config.host}:{config.port}: {getattr(error, 'strerror', None) or error}",
        hint="choose another --port, or 0 for any that is free",
    )


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _origins(host: str, port: int) -> list[str]:
    """Pages that may talk to the app: its own, by the names under which it is reached. Others are refused."""
    names = {host, "localhost", "127.0.0.1"}
    if not _is_local(host):
        names |= {socket.gethostname(), socket.getfqdn()}
        names |= {str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), port, family=socket.AF_INET)}
    return sorted(f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name in names)

"""Sharing a local store over HTTP: the catalog brought up to date, an address to listen at, and the server."""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import logging
import re
import socket
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override
from uvicorn import Config, Server

import featstore.store
from featstore.errors import BadRequestError, StorageError
from featstore.store import Store, serve
from featstore.store.local import LocalObjects

MAX_CONNECTIONS = 256
"""Connections at once; beyond it, those that have been idle longest are closed."""
IDLE_SECONDS = 100
"""How long a connection may wait for its next request: longer than clients keep theirs (90 s), so that it is
they who close them and no request meets a closed one."""
STALL_SECONDS = 30.0
"""How long a client may take over its first request, and how long it may take nothing of an answer."""
_LINGER_SECONDS = 1
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What to share, and where."""

    store: str = "features.zarr"
    """Path of the store."""
    host: str = "127.0.0.1"
    """Address to listen at; other machines reach it only if it is no loopback address."""
    port: int = 8321
    """Port to listen at; 0: any that is free."""
    token: str | None = dataclasses.field(default=None, repr=False)
    """What clients have to present; None: nothing."""

    def __post_init__(self) -> None:
        """Refuse what cannot be listened at or presented."""
        if not 0 <= self.port <= 65535:
            raise BadRequestError(f"port {self.port} is outside 0..65535")
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise BadRequestError(
                "that token cannot be sent in a header",
                hint="use letters, digits and signs, no spaces; e.g. from `openssl rand -hex 16`",
            )


class Sharing:
    """A store that is about to be served: clients can connect already, and are answered once `run` is called."""

    url: str
    """What a colleague gives as ``--store``."""
    exposed: bool
    """Whether other machines reach it without a token."""
    note: str | None
    """What else the user should know."""

    def __init__(self, config: ServeConfig, store: Store, root: Path, listener: socket.socket) -> None:
        address = listener.getsockname()
        local = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
        aside, self.note = _catalog(config.store, store, root)
        self.url = f"http://{_reachable(config.host)}:{address[1]}"
        self.exposed = not local and config.token is None
        self._listener = listener
        self._server: _Server = _Server(
            Config(
                serve.application(
                    root,
                    page=serve.IndexPage(store),
                    token=config.token,
                    hosts={config.host.lower(), *_LOOPBACK} if local and config.token is None else None,
                    aside=aside,
                ),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level=logging.CRITICAL,  # What deserves a line is said by the application.
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=2 * MAX_CONNECTIONS,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=_LINGER_SECONDS,
                timeout_notify=0,  # Once a second, which is as often as uvicorn looks.
                callback_notify=_Warden(lambda: self._server.server_state.connections),
            )
        )

    def run(self, started: Callable[[], None] | None = None) -> None:
        """Answer requests until Ctrl-C (KeyboardInterrupt), a signal, or `stop`.

        Args:
            started: called once requests are answered.
        """
        self._server.started_hook = started
        try:
            self._server.run(sockets=[self._listener])
        finally:
            self._listener.close()

    def stop(self) -> None:
        """Make `run` return, from another thread."""
        self._server.should_exit = True


def share(config: ServeConfig) -> Sharing:
    """Open a store, bring its catalog up to date and listen.

    Raises:
        NotFoundError: if there is no store.
        BadRequestError: for a store that is not local, or an address that cannot be listened at.
        CorruptError: if the store's documents are damaged.
    """
    store = featstore.store.open(config.store)
    if not isinstance(store.objects, LocalObjects):
        raise BadRequestError(
            f"{config.store!r} is no local store, and needs no server",
            hint="colleagues read a remote store by its own URL",
        )
    listener = _listen(config.host, config.port)
    try:
        return Sharing(config, store, store.objects.root, listener)
    except BaseException:
        listener.close()
        raise


def _catalog(url: str, store: Store, root: Path) -> tuple[Mapping[str, bytes], str | None]:
    """Bring the catalog up to date. Where the store cannot be written: one to serve beside it, and the reason."""
    try:
        store.objects.require_writable()
        _finish(featstore.store.create(url))
    except StorageError as error:
        aside = _Aside(root)
        _finish(Store(url, aside, writable=True))
        return aside.kept, f"{error}; its catalog is made in memory, and served where the store has none"
    return {}, None


def _finish(store: Store) -> None:
    """Put what readers that cannot list go by: the runs that there are, and which of their blocks are complete."""
    store.finish([run for name in store.datasets() for run in store.dataset(name).runs()])


class _Aside(LocalObjects):
    """A folder whose new objects are kept in memory."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.kept: dict[str, bytes] = {}

    @override
    def put(self, key: str, *buffers: bytes | memoryview, durable: bool = True) -> int:
        self.kept[key] = b"".join(buffers)
        return len(self.kept[key])

    @override
    def delete(self, key: str, *, durable: bool = True) -> None:
        self.kept.pop(key, None)

    @override
    def settle(self, folder: str) -> None:
        return


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at ``host`` and ``port``.

    Raises:
        BadRequestError: if that is impossible, such as a port that is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=MAX_CONNECTIONS)
    except (OSError, UnicodeError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        raise BadRequestError(
            f"cannot listen at {host}:{port}: {getattr(error, 'strerror', None) or error}",
            hint="choose another --port, or 0 for any that is free" if taken else "choose another --host or --port",
        ) from None
    # asyncio sends without delay (40 ms an answer) only where a socket says that it is TCP, which this one does not.
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=listener.detach())


def _reachable(host: str) -> str:
    """``host`` as others write it in a URL; for all addresses at once, the one they see."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return _own_address()
    return f"[{host}]" if address.version == 6 else host


def _own_address() -> str:
    """The address of this machine in the network that it reaches others by; its name where it is in none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # One that is set aside for documentation; no packet is sent.
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


class _Server(Server):
    """Tells when it has started: from then on Ctrl-C ends it in good order."""

    started_hook: Callable[[], None] | None = None

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started_hook is not None:
            self.started_hook()


class _Warden:
    """Closes connections whose clients hold them by doing nothing.

    uvicorn waits without end for a request that trickles in and for a client that takes nothing of its
    answer, and turns everybody away once there are too many of those.
    """

    def __init__(self, connections: Any) -> None:
        self._connections = connections
        self._seen: weakref.WeakKeyDictionary[Any, tuple[Any, float]] = weakref.WeakKeyDictionary()

    async def __call__(self) -> None:
        """Look at all connections; called about once a second."""
        now = time.monotonic()
        idle = []
        for connection in list(self._connections()):
            cycle, unsent = connection.cycle, connection.transport.get_write_buffer_size()
            answering = cycle is not None and not (cycle.response_complete and unsent == 0)
            state = (id(cycle), answering, unsent)
            if self._seen.get(connection, (None, 0.0))[0] != state:
                self._seen[connection] = (state, now)
            still = now - self._seen[connection][1]
            if answering:
                # Nothing unsent means that it waits for the disk, which is not the client's doing.
                if unsent and still > STALL_SECONDS:
                    connection.transport.abort()
            elif still > (STALL_SECONDS if cycle is None else IDLE_SECONDS):
                connection.transport.abort()
            else:
                idle.append((still, id(connection), connection))
        for _, _, connection in sorted(idle, reverse=True)[: max(0, len(self._connections()) - MAX_CONNECTIONS)]:
            connection.transport.abort()

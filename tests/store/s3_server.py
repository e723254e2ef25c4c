"""Servers on loopback for the tests of remote stores: moto's S3, and a proxy that goes wrong when told to."""

from __future__ import annotations

import dataclasses
import http.client
import http.server
import logging
import os
import socket
import ssl
import struct
import threading
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REMOTE_VARIABLES = ("AWS_", "GOOGLE_", "AZURE_", "FEATSTORE_REMOTE_", "FEATSTORE_TOKEN")


_SIGNED = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    headers: dict[str, str]


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose method and path fit."""

    times: int = 1
    method: str = ""
    path: str = ""
    """A part of the path and query."""
    status: int = 0
    """Answer this instead."""
    body: bytes = b"<Error><Code>Injected</Code></Error>"
    """Body of that answer."""
    delay_seconds: float = 0
    """Wait as long before anything is done."""
    pass_on: bool = False
    """Let the server do what is asked before the answer is replaced or lost."""
    drop: bool = False
    """Reset the connection instead of answering."""
    cut_bytes: int | None = None
    """Send the header and as many bytes of the body, then close."""
    shorten_bytes: int = 0
    """Answer a range that ends so many bytes early, and say so."""
    pause_seconds: float = 0
    """Send the body in 16 pieces with such a pause before each."""
    call: Callable[[], object] | None = None
    """Called before the request is passed on."""

    def fits(self, request: Request) -> bool:
        return self.times > 0 and self.method in ("", request.method) and self.path in request.path


class Proxy:
    """Passes requests on to an HTTP server; `faults` says with which ones something goes wrong.

    Puts under a condition go through one by one: moto looks first and puts later, so that two at once could both win.

    Args:
        port: where the server listens on 127.0.0.1.
        listen: port of the proxy itself; 0: any that is free.
        tls: what makes it speak HTTPS.
    """

    def __init__(self, port: int, *, listen: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.upstream_port = port
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.strip: tuple[str, ...] = ()
        """Headers, lower-case, that do not get through, as if the server did not know them."""
        self.choose: Callable[[Request], Fault | None] = lambda _: None
        """Says what goes wrong with a request that no ordered fault fits."""
        self.google = False
        """Be Google's XML interface, which is that of S3 but for a header and how paths are written."""
        self.weaken = False
        """Be a server whose ETags are weak."""
        self._lock = threading.Lock()
        self._conditional = threading.Lock()
        self._closed = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", listen), self._handler())
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, **what: object) -> Fault:
        """Order a fault."""
        fault = Fault(**what)
        self.faults.append(fault)
        return fault

    def reset(self) -> None:
        self.faults, self.log, self.strip = [], [], ()
        self.choose = lambda _: None
        self.google = self.weaken = False

    def asked(self) -> list[str]:
        """Method and last part of the path of each request, in order."""
        return [f"{one.method} {one.path.partition('?')[0].rpartition('/')[2]}" for one in self.log]

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def _take(self, request: Request) -> Fault:
        with self._lock:
            self.log.append(request)
            for fault in self.faults:
                if fault.fits(request):
                    fault.times -= 1
                    return fault
            return self.choose(request) or Fault()

    def _ask_upstream(self, request: Request, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        lost = ("connection", "transfer-encoding", *self.strip)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in lost}
        path = request.path
        if self.google:
            before, mark, after = path.partition("?")
            path = urllib.parse.unquote(before) + mark + after
            headers["authorization"] = _SIGNED
            if headers.get("x-goog-if-generation-match") == "0":
                headers["If-None-Match"] = "*"
        conditional = any(name.lower() == "if-none-match" for name in headers)
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream_port, timeout=60)
        try:
            if conditional:
                self._conditional.acquire()
            connection.request(request.method, path, body=body or None, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            if conditional:
                self._conditional.release()
            connection.close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_: object) -> None:
                pass

            def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: Fault) -> None:
                self.send_response_only(status)
                length = str(len(body))
                for name, value in headers:
                    if name.lower() == "content-length" and self.command == "HEAD":
                        length = value
                    elif name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        weak = "W/" if proxy.weaken and name.lower() == "etag" else ""
                        self.send_header(name, weak + value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if fault.cut_bytes is not None:
                    self.wfile.write(body[: fault.cut_bytes])
                    self.close_connection = True
                    return
                step = -(-len(body) // 16) if fault.pause_seconds else len(body)
                for at in range(0, len(body), step or 1):
                    if fault.pause_seconds and proxy._closed.wait(fault.pause_seconds):
                        return
                    self.wfile.write(body[at : at + step])

            def reset(self) -> None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                request = Request(self.command, self.path, dict(self.headers))
                fault = proxy._take(request)
                if fault.delay_seconds:
                    proxy._closed.wait(fault.delay_seconds)
                if fault.call:
                    fault.call()
                if (fault.drop or fault.status) and not fault.pass_on:
                    reply = (fault.status, [], fault.body)
                else:
                    if fault.shorten_bytes:
                        start, _, end = request.headers["range"].removeprefix("bytes=").partition("-")
                        request.headers["range"] = f"bytes={start}-{int(end) - fault.shorten_bytes}"
                    reply = proxy._ask_upstream(request, body)
                    if fault.status:
                        reply = (fault.status, [], fault.body)
                if fault.drop:
                    self.reset()
                    return
                self.answer(*reply, fault)

            def handle_expecting_the_client_to_leave(self) -> None:
                try:
                    self.handle_one()
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_expecting_the_client_to_leave  # noqa: N815

        return Handler


class S3:
    """moto's S3 server behind a `Proxy`."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self.moto_port = self._moto.get_host_and_port()[1]
        self.proxy = Proxy(self.moto_port)

    def new_bucket(self) -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        url = f"http://127.0.0.1:{self.moto_port}/{name}"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT")).close()
        return name

    def close(self) -> None:
        self.proxy.close()
        self._moto.stop()


class Web:
    """A plain web server of a folder: starlette's static files, which know ranges and ETags but no If-Match."""

    def __init__(self, folder: Path) -> None:
        import uvicorn
        from starlette.applications import Starlette
        from starlette.routing import Mount
        from starlette.staticfiles import StaticFiles

        app = Starlette(routes=[Mount("/", StaticFiles(directory=folder))])
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        self.proxy = Proxy(self._socket.getsockname()[1])

    def close(self) -> None:
        self.proxy.close()
        self._server.should_exit = True
        self._thread.join(5)
        self._socket.close()


@dataclasses.dataclass
class Bucket:
    """An empty bucket, to which the environment leads."""

    name: str
    proxy: Proxy

    @property
    def url(self) -> str:
        """Of a store in it."""
        return f"s3://{self.name}/team/store"


def clean_environment(patch: pytest.MonkeyPatch) -> None:
    """Take away what leads to other places, and set what gives up soon."""
    for name in [name for name in os.environ if name.startswith(REMOTE_VARIABLES)]:
        patch.delenv(name)
    patch.setenv("AWS_CONFIG_FILE", "/nonexistent/config")
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/credentials")
    patch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    patch.setenv("FEATSTORE_REMOTE_TIMEOUT_SECONDS", "2")
    patch.setenv("FEATSTORE_REMOTE_RETRY_SECONDS", "15")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """moto's server, one for all tests of a process."""
    server = S3()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An own bucket, and an environment that leads to it."""
    clean_environment(monkeypatch)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.proxy.url)
    s3_server.proxy.reset()
    return Bucket(s3_server.new_bucket(), s3_server.proxy)

"""A web server on loopback with one file, which knows ranges and goes wrong when told to."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.server
import socket
import struct
import threading
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client asked for."""

    path: str
    headers: dict[str, str]


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next ``times`` requests."""

    times: int = 1
    status: int = 0
    """Answer this instead."""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    """Added to the answer."""
    cut_bytes: int | None = None
    """Send as many bytes of the body, then reset the connection."""
    drop: bool = False
    """Reset the connection instead of answering."""
    stall: bool = False
    """Send the header and nothing more until the client gives up."""


class FileServer:
    """Serves ``content`` at every path; ``log`` and ``sent_bytes`` tell what was asked and answered."""

    def __init__(self, port: int) -> None:
        self.content = b""
        self.url = f"http://127.0.0.1:{port}"
        self.ranges = True
        self.conditions = True
        """Whether If-Range is looked at."""
        self.tags = True
        """Whether answers have an ETag; a time of the last change they always have."""
        self.length = True
        """Whether answers have a Content-Length."""
        self.most_bytes: int | None = None
        """Ranges are answered in part, by as many bytes."""
        self.pause_bytes: int | None = None
        """Stop after so many bytes of the next bodies; the connection ends when `go` is set."""
        self.go = threading.Event()
        self.paused = threading.Event()
        self.last_modified = "Wed, 21 Oct 2015 07:28:00 GMT"
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.sent_bytes = 0
        self.lock = threading.Lock()

    @property
    def tag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:16]}"'

    def next_fault(self) -> Fault | None:
        with self.lock:
            if not self.faults:
                return None
            fault = self.faults[0]
            fault.times -= 1
            if fault.times <= 0:
                self.faults.pop(0)
            return fault


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: FileServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.files
        server.log.append(Request(self.path, dict(self.headers)))
        fault = server.next_fault() or Fault(times=0)
        if fault.drop:
            return self._reset()
        if fault.status:
            self.send_response(fault.status)
            for name, value in {"Content-Length": "0", **fault.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            return None
        content, begin, status = server.content, 0, 200
        asked = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        current = condition in (None, server.tag if server.tags else server.last_modified)
        if asked and server.ranges and (current or not server.conditions):
            begin, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
        if begin >= len(content) and status == 206:
            status = 416
        self.send_response(status)
        end = len(content)
        if status == 206:
            end = min(end, begin + (server.most_bytes or end))
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        if server.tags:
            self.send_header("ETag", server.tag)
        self.send_header("Last-Modified", server.last_modified)
        body = b"" if status == 416 else content[begin:end]
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Transfer-Encoding", "chunked")
        for name, value in fault.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault.stall:
            server.go.wait(30)
            return self._reset()
        if fault.cut_bytes is not None:
            self._send(body[: fault.cut_bytes])
            return self._reset()
        if server.pause_bytes is not None and server.pause_bytes < len(body):
            self._send(body[: server.pause_bytes])
            server.paused.set()
            server.go.wait(30)
            return self._reset()
        self._send(body)
        if not server.length:
            self.wfile.write(b"0\r\n\r\n")
        return None

    def _send(self, body: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(body), 2**14):
                piece = body[start : start + 2**14]
                self.wfile.write(piece if self.files.length else b"%x\r\n%b\r\n" % (len(piece), piece))
                with self.files.lock:
                    self.files.sent_bytes += len(piece)

    def _reset(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        # An orderly end, so that what was sent arrives: a reset may overtake it.
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that leave, or are killed, are what is tested."""


@contextlib.contextmanager
def serving() -> Iterator[FileServer]:
    """A server of its own, gone in the end."""
    handler = type("Handler", (_Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    handler.files = files = FileServer(server.server_port)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield files
    finally:
        files.go.set()
        server.shutdown()
        server.server_close()
        thread.join()


def refused_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

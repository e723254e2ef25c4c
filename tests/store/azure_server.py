"""A stand-in for Azure's blob service: as much of its interface as a store asks for, in a dictionary.

There is no emulator of it among Python's packages. Microsoft's own, Azurite, was tried by hand: the same
store is made, read and verified there.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import re
import threading
import urllib.parse
from email.utils import formatdate
from xml.sax.saxutils import escape

ACCOUNT = "devstoreaccount1"
KEY = base64.b64encode(b"no secret").decode()


class Azure:
    """The service, with one container; `log` has methods, paths and headers of all requests."""

    container = "container"

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, str], bytes] = {}
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self._lock = threading.Lock()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/{ACCOUNT}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        before, _, after = path.partition("?")
        query = dict(urllib.parse.parse_qsl(after, keep_blank_values=True))
        _, account, container, *rest = urllib.parse.unquote(before).split("/")
        assert account == ACCOUNT
        if container != self.container:
            return 404, {}, b"<Error><Code>ContainerNotFound</Code></Error>"
        if query.get("comp") == "batch":
            return self._delete_batch(headers, body)
        if query.get("comp") == "list":
            return 200, {"Content-Type": "application/xml"}, self._list(query)
        name = "/".join(rest)
        with self._lock:
            if method == "PUT":
                return self._put(name, query, headers, body)
            if name not in self.blobs:
                return 404, {}, b"" if method == "HEAD" else b"<Error><Code>BlobNotFound</Code></Error>"
            if method == "DELETE":
                del self.blobs[name]
                return 202, {}, b""
            return self._get(name, headers)

    def _put(self, name: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> tuple[int, dict, bytes]:
        if query.get("comp") == "block":
            self.parts[name, query["blockid"]] = body
            return 201, {}, b""
        if query.get("comp") == "blocklist":
            body = b"".join(self.parts[name, one] for one in re.findall(r"<\w+>([^<>]+)</\w+>", body.decode()))
        if headers.get("if-none-match") == "*" and name in self.blobs:
            return 409, {}, b"<Error><Code>BlobAlreadyExists</Code></Error>"
        self.blobs[name] = body
        return 201, self._about(body), b""

    def _get(self, name: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        body = self.blobs[name]
        about = self._about(body)
        if headers.get("if-match", about["ETag"]) != about["ETag"]:
            return 412, {}, b"<Error><Code>ConditionNotMet</Code></Error>"
        wanted = headers.get("x-ms-range") or headers.get("range")
        if wanted is None:
            return 200, about, body
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
        if match is None:
            return 400, {}, b"<Error><Code>InvalidHeaderValue</Code></Error>"  # As for ranges that count from the end.
        start, end = int(match[1]), min(int(match[2] or len(body)), len(body) - 1)
        if start >= len(body):
            return 416, {}, b"<Error><Code>InvalidRange</Code></Error>"
        return 206, about | {"Content-Range": f"bytes {start}-{end}/{len(body)}"}, body[start : end + 1]

    def _delete_batch(self, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Several deletions as the parts of one request, which is how obstore asks for one."""
        answers = []
        for number, path in enumerate(re.findall(r"^DELETE (\S+) HTTP", body.decode(), flags=re.MULTILINE)):
            status, _, _ = self.answer("DELETE", path, headers, b"")
            words = {202: "Accepted", 404: "The specified blob does not exist."}[status]
            answers.append(
                "--batchresponse\r\nContent-Type: application/http\r\n"
                f"Content-ID: {number}\r\n\r\nHTTP/1.1 {status} {words}\r\nContent-Length: 0\r\n\r\n"
            )
        said = "".join([*answers, "--batchresponse--\r\n"])
        return 202, {"Content-Type": "multipart/mixed; boundary=batchresponse"}, said.encode()

    def _about(self, body: bytes) -> dict[str, str]:
        digest = hashlib.sha256(body).hexdigest()[:16]
        return {"ETag": f'"0x{digest}"', "Last-Modified": formatdate(0, usegmt=True), "x-ms-version": "2023-11-03"}

    def _list(self, query: dict[str, str]) -> bytes:
        prefix, found = query.get("prefix", ""), {}
        for name, body in sorted(self.blobs.items()):
            if name.startswith(prefix):
                head, slash, _ = name[len(prefix) :].partition("/")
                found[prefix + head + slash] = body
        items = []
        for name, body in found.items():
            if name.endswith("/"):
                items.append(f"<BlobPrefix><Name>{escape(name)}</Name></BlobPrefix>")
                continue
            about = self._about(body)
            items.append(
                f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{about['Last-Modified']}</Last-Modified>"
                f"<Etag>{escape(about['ETag'])}</Etag><Content-Length>{len(body)}</Content-Length>"
                "<Content-Type>x</Content-Type></Properties></Blob>"
            )
        return (
            '<?xml version="1.0" encoding="utf-8"?><EnumerationResults>'
            f"<Prefix>{escape(prefix)}</Prefix><Blobs>{''.join(items)}</Blobs><NextMarker/></EnumerationResults>"
        ).encode()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        azure = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                azure.log.append((self.command, self.path, headers))
                status, about, answer = azure.answer(self.command, self.path, headers, body)
                self.send_response_only(status)
                for name, value in about.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_one  # noqa: N815

        return Handler

"""A store shared over HTTP: right answers, and a hostile client that gets nowhere."""

from __future__ import annotations

import base64
import contextlib
import http.client
import os
import re
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import featstore.store as fs
from featstore.errors import BadRequestError, StorageError
from featstore.pipelines import serving
from featstore.pipelines.serving import ServeConfig, share
from featstore.store import serve
from featstore.store.local import LocalObjects

SECRET = b"the secret beside the store"


class Client:
    """Requests as they are written, so that no library makes them harmless."""

    def __init__(self, port):
        self.port = port

    def connect(self, timeout=20):
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def __call__(self, path, method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
            response = connection.getresponse()
            response.content = response.read()
            return response
        finally:
            connection.close()

    def raw(self, data):
        """The status and all bytes of the answer to ``data``; (None, b"") where the connection was just closed."""
        with self.connect() as connection:
            connection.sendall(data)
            answer = b""
            try:
                while part := connection.recv(1 << 16):
                    answer += part
            except ConnectionResetError:
                pass
        return (int(answer[9:12]) if answer else None), answer

    def line(self, target, method=b"GET"):
        return self.raw(method + b" " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")


class Served:
    """A store that is served by a thread."""

    def __init__(self, root, **options):
        self.root = Path(root)
        self.sharing = share(ServeConfig(store=str(root), port=0, **options))
        self.get = Client(int(self.sharing.url.rsplit(":", 1)[1]))
        self._thread = threading.Thread(target=self.sharing.run)
        self._thread.start()

    def stop(self):
        self.sharing.stop()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def serve_store(lab, tmp_path):
    """Serves a store of 10 images, or a folder that is given, with some options."""
    started = []

    def start(root=None, **options):
        if root is None:
            root = tmp_path / "s.zarr"
            lab.full(root, n=10)
            (tmp_path / "secret.txt").write_bytes(SECRET)
        started.append(Served(root, **options))
        return started[-1]

    yield start
    for served in started:
        served.stop()


@pytest.fixture(scope="module")
def served(lab, tmp_path_factory):
    """A served store of 10 images; read only."""
    folder = tmp_path_factory.mktemp("served")
    lab.full(folder / "s.zarr", n=10)
    (folder / "secret.txt").write_bytes(SECRET)
    (folder / "s.zarr/toy/.hidden").write_bytes(SECRET)
    one = Served(folder / "s.zarr")
    yield one
    one.stop()


@pytest.fixture
def get(served):
    return served.get


@pytest.fixture
def shard(served):
    (path,) = served.root.glob("toy/reference/*/t050/up1/c.0.0.0.0")
    return str(path.relative_to(served.root)), path.read_bytes()


def test_every_object_is_served_as_it_is(served, get):
    files = {p for p in served.root.rglob("[!.]*") if p.is_file() and ".featstore" not in p.parts}
    assert len(files) > 10
    for path in files:
        key = path.relative_to(served.root)
        whole, head = get(f"/{key}"), get(f"/{key}", method="HEAD")
        assert (whole.status, head.status) == (200, 200)
        assert whole.content == path.read_bytes()
        assert head.content == b""
        told = {"Content-Length": str(path.stat().st_size), "Accept-Ranges": "bytes", "ETag": whole.headers["ETag"]}
        for response in (whole, head):
            assert {name: response.headers[name] for name in told} == told
        assert re.fullmatch('"[^"]+"', whole.headers["ETag"])


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=5-9", slice(5, 10)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=-999999999999", slice(None)),
        ("bytes=3-99999999999999999999", slice(3, None)),
    ],
)
def test_ranges(get, shard, asked, part):
    key, data = shard
    wanted = data[part]
    first = range(len(data))[part][0]
    for method in ("GET", "HEAD"):
        response = get(f"/{key}", method, Range=asked)
        assert response.status == 206
        assert response.headers["Content-Range"] == f"bytes {first}-{first + len(wanted) - 1}/{len(data)}"
        assert int(response.headers["Content-Length"]) == len(wanted)
        assert response.content == (wanted if method == "GET" else b"")


@pytest.mark.parametrize("asked", ["bytes={size}-", "bytes=-0", "bytes={size}-{size}", "bytes=99999999999999999999-"])
def test_ranges_that_cannot_be_satisfied(get, shard, asked):
    key, data = shard
    response = get(f"/{key}", Range=asked.format(size=len(data)))
    assert response.status == 416
    assert response.headers["Content-Range"] == f"bytes */{len(data)}"


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=--5",
        "bytes=5--5",
        "bytes=9-5",
        "bytes=-",
        "bytes=",
        "bytes",
        "=",
        "bytes=a-b",
        "bytes=0x1-0x2",
        "bytes=1e9-",
        "bytes=" + "9" * 6000 + "-",
        "bytes=-" + "9" * 6000,
        "bytes=" + ",".join("0-" for _ in range(4000)),
        "bytes=" + ",".join(f"{i}-{i}" for i in range(0, 2000, 2)),
        "bytes=" + "," * 9000,
        "lines=1-2",
        "bytes=0-0,-1",
    ],
    ids=lambda text: text[:24],
)
def test_absurd_ranges_are_harmless(get, shard, asked):
    key, data = shard
    response = get(f"/{key}", Range=asked)
    assert response.status in (200, 206, 400, 416)
    assert len(response.content) < len(data) + 100 * 100
    assert response.status != 200 or response.content == data
    assert get(f"/{key}").content == data


def test_conditions(get, shard):
    key, data = shard
    tag = get(f"/{key}").headers["ETag"]
    for matching in (tag, f'"x", {tag}', "*"):
        assert get(f"/{key}", If_Match=matching).content == data
        assert get(f"/{key}", If_Match=matching, Range="bytes=2-3").content == data[2:4]
        assert get(f"/{key}", If_None_Match=matching).status == 304
    for other in ('"x"', f"W/{tag}", tag.strip('"'), ""):
        refused = get(f"/{key}", If_Match=other, Range="bytes=2-3")
        assert (refused.status, refused.headers["ETag"]) == (412, tag)
    assert get(f"/{key}", If_None_Match=f"W/{tag}").status == 304
    assert get(f"/{key}", If_None_Match='"x"').content == data
    assert get(f"/{key}", If_Range=tag, Range="bytes=2-3").content == data[2:4]
    assert get(f"/{key}", If_Range='"x"', Range="bytes=2-3").content == data
    assert get("/toy/none", If_Match="*").status == 404


def test_a_replaced_object_has_another_etag_even_at_the_same_size_and_time(serve_store):
    served = serve_store()
    path = served.root / "toy/zarr.json"
    first = served.get("/toy/zarr.json")
    times = path.stat()
    LocalObjects(served.root).put("toy/zarr.json", first.content[::-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = served.get("/toy/zarr.json")
    assert second.content == first.content[::-1]
    assert second.headers["ETag"] != first.headers["ETag"]
    assert served.get("/toy/zarr.json", If_Match=first.headers["ETag"]).status == 412


def test_an_answer_under_way_stays_one_object_when_it_is_replaced(serve_store):
    served = serve_store()
    old, new = (np.random.default_rng(seed).bytes(40 << 20) for seed in (0, 1))
    objects = LocalObjects(served.root)
    objects.put("toy/c.0.0", old)
    with served.get.connect() as connection:
        connection.sendall(b"GET /toy/c.0.0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = bytearray(connection.recv(1000))
        objects.put("toy/c.0.0", new[: 1 << 20])
        while part := connection.recv(1 << 20):
            answer += part
    assert answer.partition(b"\r\n\r\n")[2] == old
    assert served.get("/toy/c.0.0").content == new[: 1 << 20]


@pytest.mark.parametrize(
    "target",
    [
        b"/../secret.txt",
        b"/toy/../../secret.txt",
        b"/%2e%2e/secret.txt",
        b"/%2E%2E%2Fsecret.txt",
        b"/..%2fsecret.txt",
        b"/%252e%252e/secret.txt",
        b"/..\\secret.txt",
        b"/..%5csecret.txt",
        b"//secret.txt",
        b"/./zarr.json",
        b"/toy/./zarr.json",
        b"/toy//zarr.json",
        b"/toy",
        b"/toy/",
        b"/zarr.json/",
        b"/zarr.json/x",
        b"/.featstore/lock-01",
        b"/%2efeatstore/lock-01",
        b"/toy/.hidden",
        b"/zarr.json%00",
        b"/%00",
        b"/zarr.json%0a",
        b"/zarr.json%0d%0aX:%20y",
        b"/%ff%fe",
        b"/%c0%ae%c0%ae/secret.txt",
        b"/z\xc3\xa4rr.json",
        b"/" + b"a" * 300,
        b"/" + b"/".join([b"a"] * 3000),
        b"/" + b"a" * 100_000,
        b"/toy" + b"/.." * 1000 + b"/etc/passwd",
        b"http://x/../secret.txt",
        b"*",
        b"secret.txt",
        b"",
    ],
    ids=lambda target: repr(target[:30]),
)
def test_paths_that_are_no_objects_are_refused(served, get, target):
    for method in (b"GET", b"HEAD"):
        status, answer = get.line(target, method)
        assert status in (400, 404)
        assert SECRET not in answer
        assert b"root:" not in answer
        assert len(answer) < 1000
    assert get("/zarr.json").status == 200


def test_links_and_what_is_no_file(serve_store, tmp_path):
    served = serve_store()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/zarr.json").write_bytes(SECRET)
    (served.root / ".featstore/inside").write_bytes(SECRET)
    (served.root / "file").symlink_to(tmp_path / "secret.txt")
    (served.root / "relative").symlink_to("../secret.txt")
    (served.root / "folder").symlink_to(tmp_path / "outside")
    (served.root / "hidden").symlink_to(served.root / ".featstore/inside")
    (served.root / "circle").symlink_to("circle")
    (served.root / "dangling").symlink_to("nowhere")
    os.mkfifo(served.root / "pipe")
    for target in ("file", "relative", "folder/zarr.json", "hidden", "circle", "dangling", "pipe"):
        assert served.get(f"/{target}").status == 404, target
    (served.root / "within").symlink_to("toy/zarr.json")
    assert served.get("/within").content == (served.root / "toy/zarr.json").read_bytes()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "get"])
def test_nothing_but_get_and_head(served, get, method):
    before = (served.root / "zarr.json").read_bytes()
    for target in ("/", "/zarr.json", "/new.json", "/.featstore/lock-01"):
        status, answer = get.line(target.encode(), method.encode())
        assert status == 405
        assert re.search(rb"(?i)allow: (GET, HEAD|HEAD, GET)", answer)
    assert (served.root / "zarr.json").read_bytes() == before
    assert not (served.root / "new.json").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /zarr.json HTTP/1.1\r\n" + b"X: y\r\n" * 20000,
        b"GET /zarr.json HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n" + b"z" * 200_000,
        b"GET /zarr.json HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET /zarr.json HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nzzzzz\r\n",
        b"GET /zarr.json HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        np.random.default_rng(0).bytes(100_000),
    ],
    ids=lambda data: repr(data[:30]),
)
def test_what_is_no_request_is_harmless(get, data):
    with get.connect(timeout=2) as connection:
        try:
            connection.sendall(data)
            connection.recv(1000)
        except (ConnectionError, TimeoutError):
            pass
    assert get("/zarr.json").status == 200


PIECES = [
    b"..",
    b".",
    b"/",
    b"%2e",
    b"%2f",
    b"%5c",
    b"%25",
    b"%00",
    b"%0d%0a",
    b"\\",
    b"toy",
    b"zarr.json",
    b"secret.txt",
]
PIECES += [b".featstore", b".hidden", b"?", b"#", b"http://x", b"~", b"%c0%ae", b"\xff", b"%", b"%u002e", b";", b":"]
NUMBERS = ["0", "1", "-1", "", "5", "9" * 25, "1e3", "0x1", " 1", "+1", "١", "4294967296", "1_0"]
HEADERS = [
    "Range",
    "Range",
    "If-Range",
    "If-Match",
    "If-None-Match",
    "Host",
    "Authorization",
    "Content-Length",
    "Expect",
]
RANGES = st.lists(st.tuples(st.sampled_from(NUMBERS), st.sampled_from(["-", "--", "", ":"]), st.sampled_from(NUMBERS)))
VALUES = (
    RANGES.map(lambda parts: "bytes=" + ",".join(map("".join, parts)))
    | st.sampled_from(NUMBERS)
    | st.text('a"*,/ \t=é\x01', max_size=9)
)


def count_requests(served, told, count):
    """Requests made of what leads elsewhere, and headers that make no sense: never a byte of what is no object."""
    objects = {p.read_bytes() for p in served.root.rglob("[!.]*") if p.is_file() and ".featstore" not in p.parts}
    whole = b"".join(objects)
    seen = Counter()

    @hypothesis.settings(max_examples=count, deadline=None, database=None, derandomize=True)
    @hypothesis.given(
        pieces=st.lists(st.sampled_from(PIECES), max_size=6) | st.sampled_from([[b"zarr.json"], [b"toy/zarr.json"]]),
        headers=st.dictionaries(st.sampled_from(HEADERS), VALUES, max_size=3),
        method=st.sampled_from([b"GET", b"GET", b"GET", b"GET", b"HEAD", b"POST", b"\x00"]),
    )
    def each(pieces, headers, method):
        asked = {"Host": "localhost", **headers}
        lines = b"".join(f"{name}: {value}\r\n".encode() for name, value in asked.items())
        target = b"/" + b"".join(pieces)
        with served.get.connect() as connection:
            connection.sendall(method + b" " + target + b" HTTP/1.1\r\n" + lines + b"Connection: close\r\n\r\n")
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(1 << 16):
                    answer += part
        assert SECRET not in answer
        status = int(answer[9:12]) if answer else 0
        assert status in (0, 200, 206, 304, 400, 401, 404, 405, 412, 416, 421, 431), (status, target, lines)
        body = answer.partition(b"\r\n\r\n")[2]
        if status == 206 and b"multipart" not in answer:
            assert body in whole
        elif status == 200 and body and b"text/html" not in answer:
            assert body in objects
        seen[status] += 1

    each()
    assert served.get("/zarr.json").status == 200
    told(
        f"{seen.total()} hostile requests, by status (0: the connection was just closed): {dict(sorted(seen.items()))}"
    )


def test_made_up_requests_are_harmless(served, told):
    count_requests(served, told, 150)


@pytest.mark.full
def test_many_made_up_requests_are_harmless(served, told):
    count_requests(served, told, 3000)


def basic(token, name="me"):
    return "Basic " + base64.b64encode(f"{name}:{token}".encode()).decode()


def test_with_a_token_nothing_is_served_without_it(serve_store):
    get = serve_store(token="horse-battery").get
    for right in ("Bearer horse-battery", "bearer  horse-battery", basic("horse-battery"), basic("horse-battery", "")):
        for target in ("/", "/zarr.json"):
            assert get(target, Authorization=right).status == 200
    wrong = [
        "",
        "Bearer",
        "Bearer ",
        "Bearer horse",
        "Bearer horse-batteryy",
        "Bearer HORSE-BATTERY",
        "Token horse-battery",
    ]
    wrong += [
        basic("horse"),
        basic(""),
        "Basic horse-battery",
        "Basic ###",
        "Basic",
        basic("x:horse-battery"),
        "\xff\xfe",
    ]
    for given in wrong:
        for target in ("/", "/zarr.json", "/none", "/%2e%2e/secret.txt"):
            for method in ("GET", "HEAD", "PUT"):
                response = get(target, method, Authorization=given)
                assert response.status == 401, given
                assert "Bearer" in response.headers["WWW-Authenticate"]
                assert b"zarr" not in response.content
    assert get("/zarr.json").status == 401


def test_a_server_for_this_machine_is_not_reached_under_other_names(serve_store):
    get = serve_store().get
    for name in (
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "[::2]:80",
        "0",
    ):
        refused = get("/zarr.json", Host=name)
        assert refused.status == 421
        assert refused.content.startswith(b"this server is called")
    for name in ("localhost", "LOCALHOST:8321", "127.0.0.1:1", "[::1]:8321", "[::1]"):
        assert get("/zarr.json", Host=name).status == 200
    assert get.raw(b"GET /zarr.json HTTP/1.0\r\n\r\n")[0] == 200
    assert serve_store(token="horse").get("/zarr.json", Host="evil.example", Authorization="Bearer horse").status == 200


def test_the_page_says_what_there_is(get):
    page = get("/")
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    text = page.content.decode()
    for said in ("toy: 10 images", "controlnet:canny+lora", "10 of 10"):
        assert said in text


def test_the_page_escapes_what_the_store_says(lab, tmp_path):
    store, _ = lab.start(tmp_path / "a<b>.zarr", n=3, technique="prompt:<script>alert(1)</script>")
    page = serve.index_page(store)
    assert "prompt:&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page
    assert "a&lt;b&gt;.zarr" in page


def test_the_page_is_made_once_however_often_it_is_asked_for(lab, tmp_path, monkeypatch):
    store, _ = lab.full(tmp_path / "s.zarr", n=3)
    made = []
    monkeypatch.setattr(serve, "index_page", lambda _: made.append(1) or "page")
    page = serve.IndexPage(store)
    assert {page() for _ in range(5)} == {"page"}
    assert made == [1]


def test_the_page_of_a_damaged_store_says_so(served, lab, tmp_path):
    store, run = lab.full(tmp_path / "s.zarr", n=3)
    (tmp_path / "s.zarr" / run.path / "zarr.json").write_bytes(b"{}")
    assert "is damaged" in serve.index_page(store)


def catalog_files(root):
    root = Path(root)
    return {str(p.relative_to(root)): p.read_bytes() for p in (root / "catalog.json", *root.glob("catalog/*.complete"))}


def test_serving_brings_the_catalog_up_to_date(lab, serve_store, tmp_path):
    lab.fill(lab.start(tmp_path / "own.zarr", n=3)[1])
    assert not (tmp_path / "own.zarr/catalog.json").exists()
    served = serve_store(tmp_path / "own.zarr")
    assert served.sharing.note is None
    made = catalog_files(served.root)
    assert len(made) == 2
    for key, data in made.items():
        assert served.get(f"/{key}").content == data


def test_a_store_that_cannot_be_written_has_a_catalog_all_the_same(lab, serve_store, tmp_path, monkeypatch):
    for name in ("own", "other"):
        lab.fill(lab.start(tmp_path / f"{name}.zarr", n=3)[1])
    serve_store(tmp_path / "other.zarr")
    before = lab.files(tmp_path / "own.zarr")

    def refuse(_):
        raise StorageError("read-only")

    monkeypatch.setattr(LocalObjects, "require_writable", refuse)
    served = serve_store(tmp_path / "own.zarr")
    assert "read-only" in served.sharing.note
    assert lab.files(tmp_path / "own.zarr") == before
    for key, data in catalog_files(tmp_path / "other.zarr").items():
        assert served.get(f"/{key}").content == data
    (tmp_path / "own.zarr/catalog.json").write_bytes(b"{}")  # by a colleague's extraction
    assert served.get("/catalog.json").content == b"{}"


def test_plain_zarr_reads_it(served, lab):
    import zarr
    from obstore.store import HTTPStore

    (path,) = (p.parent for p in served.root.glob("toy/reference/*/t050/up1/zarr.json"))
    remote = HTTPStore.from_url(served.sharing.url, client_options={"allow_http": True})
    array = zarr.open_array(
        zarr.storage.ObjectStore(remote, read_only=True), path=str(path.relative_to(served.root)), mode="r"
    )
    _, run = lab.start(served.root, n=10)
    np.testing.assert_array_equal(array[:], lab.maps_of(run, range(10), "up1"))


def test_small_answers_are_sent_without_delay(served):
    with served.get.connect() as connection:
        connection.sendall(b"GET /zarr.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.recv(1)
        sockets = [one.transport.get_extra_info("socket") for one in served.sharing._server.server_state.connections]
        assert sockets
        assert all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in sockets)


def closed_within(connection, seconds):
    connection.settimeout(seconds)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_clients_that_do_nothing_are_cut(serve_store, monkeypatch):
    monkeypatch.setattr(serving, "STALL_SECONDS", 1.0)
    served = serve_store()
    LocalObjects(served.root).put("toy/c.0.0", bytes(64 << 20))
    silent, trickling, not_reading = (served.get.connect() for _ in range(3))
    with silent, trickling, not_reading:
        not_reading.sendall(b"GET /toy/c.0.0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        gone = None
        for letter in b"GET /zarr.json HTTP/1.1\r\nX: " + b"y" * 100:
            try:
                trickling.sendall(bytes([letter]))
            except ConnectionError as error:
                gone = error
                break
            assert served.get("/zarr.json").status == 200
            time.sleep(0.1)
        assert gone is not None
        assert closed_within(silent, 20)
        connections = served.sharing._server.server_state.connections
        deadline = time.monotonic() + 20
        while connections:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # What the kernels hold is still delivered; the end is missing.
        assert closed_within(not_reading, 20)
    assert served.get("/zarr.json").status == 200


def test_a_slow_client_gets_everything(serve_store, monkeypatch):
    monkeypatch.setattr(serving, "STALL_SECONDS", 2.0)
    served = serve_store()
    data = np.random.default_rng(0).bytes(24 << 20)
    LocalObjects(served.root).put("toy/c.0.0", data)
    begin = time.monotonic()
    with served.get.connect() as connection:
        connection.sendall(b"GET /toy/c.0.0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer, paused = bytearray(), 0
        while part := connection.recv(1 << 20):
            answer += part
            if len(answer) >> 20 > paused:
                paused += 1
                time.sleep(0.15)
    assert time.monotonic() - begin > 3
    assert answer.partition(b"\r\n\r\n")[2] == data


def test_many_connections_keep_nobody_out(serve_store, monkeypatch):
    monkeypatch.setattr(serving, "MAX_CONNECTIONS", 8)
    served = serve_store()
    idle = [served.get.connect() for _ in range(100)]

    def answered():
        try:
            return served.get("/zarr.json").status == 200
        except ConnectionError:  # It was one too many at that moment.
            return False

    try:
        deadline = time.monotonic() + 20
        while not answered():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        connected = sum(not closed_within(connection, 0.01) for connection in idle)
        assert 0 < connected <= 8
    finally:
        for connection in idle:
            connection.close()


def test_clients_that_leave_in_the_middle_leave_nothing_behind(serve_store):
    served = serve_store()
    LocalObjects(served.root).put("toy/c.0.0", bytes(32 << 20))
    served.get("/zarr.json")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(30):
        with served.get.connect() as connection:
            connection.sendall(b"GET /toy/c.0.0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            connection.recv(100)
    deadline = time.monotonic() + 20
    while len(os.listdir("/proc/self/fd")) > before:  # noqa: PTH208
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert served.get("/zarr.json").status == 200


def test_a_failing_disk_is_an_error_of_this_answer_only(served, get, monkeypatch, caplog):
    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(serve, "_open", fail)
        assert get("/zarr.json").status == 500
    assert "Input/output error" in caplog.text
    assert get("/zarr.json").status == 200


def test_requests_that_cannot_be_served(tmp_path, lab):
    lab.full(tmp_path / "s.zarr", n=3)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(BadRequestError, match="in use") as raised:
            share(ServeConfig(store=str(tmp_path / "s.zarr"), port=taken.getsockname()[1]))
        assert "--port" in raised.value.hint
    with pytest.raises(BadRequestError, match="cannot listen"):
        share(ServeConfig(store=str(tmp_path / "s.zarr"), host="192.0.2.77", port=0))
    for token in ("two words", "", "tür", "a\nb"):
        with pytest.raises(BadRequestError, match="token"):
            ServeConfig(token=token)
    assert "horse" not in repr(ServeConfig(token="horse"))
    with pytest.raises(fs.store.NotFoundError):
        share(ServeConfig(store=str(tmp_path / "none.zarr"), port=0))
    assert not (tmp_path / "none.zarr").exists()


@pytest.mark.parametrize(
    ("host", "exposed", "address"),
    [
        ("127.0.0.1", False, "127.0.0.1"),
        ("localhost", False, "localhost"),
        ("0.0.0.0", True, serving._own_address()),
        ("::1", False, "[::1]"),
    ],
)
def test_the_url_is_one_that_others_can_use(tmp_path, lab, host, exposed, address):
    lab.full(tmp_path / "s.zarr", n=3)
    sharing = share(ServeConfig(store=str(tmp_path / "s.zarr"), host=host, port=0))
    thread = threading.Thread(target=sharing.run)
    thread.start()
    try:
        assert sharing.exposed is exposed
        assert re.fullmatch(rf"http://{re.escape(address)}:\d+", sharing.url)
        connection = http.client.HTTPConnection(sharing.url.removeprefix("http://"), timeout=20)
        connection.request("GET", "/zarr.json")
        assert connection.getresponse().status == 200
        connection.close()
    finally:
        sharing.stop()
        thread.join(20)

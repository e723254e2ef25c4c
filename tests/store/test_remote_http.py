"""A store on a web server: read, and nothing else."""

from __future__ import annotations

import functools
import http.server
import threading

import numpy as np
import pytest

import featstore.store as fs
from featstore.errors import CorruptError, NotFoundError, ReplacedError, StorageError
from featstore.store.catalog import describe
from featstore.store.urls import objects_at
from featstore.store.verify import verify
from tests.store.s3_server import Fault, Web, clean_environment


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web server of ``tmp_path``."""
    clean_environment(monkeypatch)
    server = Web(tmp_path)
    yield server
    server.close()


def test_a_whole_store(web, lab, tmp_path):
    _, run = lab.full(tmp_path / "a b", 100)
    store = fs.open(f"{web.proxy.url}/a%20b/")
    assert store.datasets() == ["toy"]
    there = store.dataset("toy").runs()[0]
    assert there.path == run.path
    for layer in run.layers:
        order = np.random.default_rng(0).permutation(100)
        assert np.array_equal(there.numpy(layer, order), run.numpy(layer, order))
        assert np.array_equal(there[layer].compute(), run[layer].compute())
    report = verify(store)
    assert report.ok, report
    assert report.checked_images == 100
    assert describe(store)["datasets"][0]["runs"][0]["committed"] == 100
    assert {one.method for one in web.proxy.log} <= {"GET", "HEAD"}


def test_without_catalog_json_it_says_what_to_do(web, lab, tmp_path):
    lab.start(tmp_path / "s", 3)
    store = fs.open(f"{web.proxy.url}/s")
    with pytest.raises(NotFoundError, match=r"no catalog\.json") as caught:
        store.datasets()
    assert "featstore serve" in caught.value.hint
    with pytest.raises(StorageError, match="cannot list"):
        store.objects.names("")


def test_nothing_can_be_written(web, lab, tmp_path):
    lab.full(tmp_path / "s", 3)
    before = lab.files(tmp_path / "s")
    objects = objects_at(f"{web.proxy.url}/s")
    for ask in (
        objects.require_writable,
        lambda: objects.put("k", b"1"),
        lambda: objects.put_new("k", b"1"),
        lambda: objects.delete("zarr.json"),
        lambda: fs.create(f"{web.proxy.url}/s"),
        lambda: fs.create(f"{web.proxy.url}/another"),
    ):
        with pytest.raises(StorageError, match="can only be read"):
            ask()
    assert lab.files(tmp_path / "s") == before
    assert not web.proxy.log


def test_what_is_not_there(web):
    with pytest.raises(NotFoundError, match="no store"):
        fs.open(f"{web.proxy.url}/nothing")
    objects = objects_at(web.proxy.url)
    assert not objects.exists("k")
    assert objects.size_bytes("k") == 0


def test_a_file_that_is_replaced_while_it_is_read(web, tmp_path):
    """The server knows no If-Match: what its answers say of the file is compared instead."""
    objects = objects_at(web.proxy.url)
    for old, new in ((b"a" * 100, b"b" * 101), (b"a" * 100, b"b" * 50)):
        (tmp_path / "k").write_bytes(old)
        with objects.open("k") as snapshot:
            assert snapshot.read_tail(5) == b"a" * 5
            (tmp_path / "k").write_bytes(new)
            with pytest.raises(ReplacedError, match="replaced"):
                snapshot.read(0, 10)


def test_weak_etags_are_no_version(web, tmp_path):
    """A server that compresses has them; no condition ever fits one."""
    (tmp_path / "k").write_bytes(b"hello")
    web.proxy.weaken = True
    with objects_at(web.proxy.url).open("k") as snapshot:
        assert snapshot.read_tail(3) == b"llo"
        assert snapshot.read(0, 3) == b"hel"
        assert snapshot.version is None
    assert not any("if-match" in one.headers for one in web.proxy.log)


def test_faults_are_waited_for(web, tmp_path):
    data = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "k").write_bytes(data)
    objects = objects_at(web.proxy.url)
    for fault in ({"status": 503}, {"drop": True}, {"cut_bytes": 100}):
        web.proxy.fail(**fault)
        assert objects.get("k") == data
        web.proxy.fail(**fault)
        with objects.open("k") as snapshot:
            assert snapshot.read_tail(5000) == data[-5000:]


def test_the_token_goes_along(web, tmp_path, monkeypatch):
    (tmp_path / "k").write_bytes(b"1")
    web.proxy.choose = lambda request: (
        Fault(status=401) if request.headers.get("authorization") != "Bearer s3cret" else None
    )
    with pytest.raises(StorageError, match="401") as caught:
        objects_at(web.proxy.url).get("k")
    assert "FEATSTORE_TOKEN" in caught.value.hint
    monkeypatch.setenv("FEATSTORE_TOKEN", "s3cret")
    assert objects_at(web.proxy.url).get("k") == b"1"


def test_a_server_without_ranges(tmp_path, monkeypatch, lab):
    """Python's own: it serves documents, and not shards."""
    clean_environment(monkeypatch)
    lab.full(tmp_path / "s", 3)
    handler = functools.partial(_Silent, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        run = fs.open(f"http://127.0.0.1:{server.server_address[1]}/s").dataset("toy").runs()[0]
        with pytest.raises(StorageError, match="does not answer requests for ranges") as caught:
            run.numpy("up1", [0])
        server.shutdown()
    assert "featstore serve" in caught.value.hint


def test_truncated_files(web, tmp_path):
    (tmp_path / "k").write_bytes(b"hello")
    (tmp_path / "empty").write_bytes(b"")
    objects = objects_at(web.proxy.url)
    for key in ("k", "empty"):
        with objects.open(key) as snapshot, pytest.raises(CorruptError, match="truncated"):
            snapshot.read_tail(6)
        with objects.open(key) as snapshot, pytest.raises(CorruptError):
            snapshot.read(6, 3)


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

"""A store in a bucket: the same answers as in a folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
import zarr.storage

import featstore.store as fs
from featstore.errors import BadRequestError, CorruptError, NotFoundError, ReplacedError, StorageError
from featstore.store import remote_snapshot
from featstore.store.objects import INTERNAL
from featstore.store.remote import PART_BYTES
from featstore.store.urls import objects_at
from featstore.store.verify import verify
from tests.store.s3_server import ROOT


@pytest.fixture(params=["s3", "memory"])
def objects(request):
    """An empty place, on a server or in memory."""
    if request.param == "s3":
        return objects_at(request.getfixturevalue("s3").url)
    return objects_at(f"memory://{request.node.name}")


def read(snapshot, *places):
    """The bytes at each (offset, length), by one `read_many`."""
    targets = [bytearray(length) for _, length in places]
    snapshot.read_many([(offset, [memoryview(t)]) for (offset, _), t in zip(places, targets, strict=True)])
    return [bytes(target) for target in targets]


def test_objects(objects):
    assert not objects.exists("a/b")
    assert objects.size_bytes("a/b") == 0
    assert objects.put("a/b", b"hello ", memoryview(b"world")) == 11
    assert objects.exists("a/b")
    assert not objects.exists("a")
    assert objects.size_bytes("a/b") == 11
    assert objects.get("a/b") == b"hello world"
    assert objects.get("a/b", max_bytes=11) == b"hello world"
    with pytest.raises(CorruptError, match="11 bytes; at most 10"):
        objects.get("a/b", max_bytes=10)
    objects.put("a/b", b"")
    assert objects.get("a/b") == b""
    objects.delete("a/b")
    objects.delete("a/b")
    for ask in (objects.get, lambda key: objects.open(key).size_bytes, lambda key: objects.open(key).read_tail(1)):
        with pytest.raises(NotFoundError, match="a/b"):
            ask("a/b")


def test_names(objects):
    for key in ("x/zarr.json", "x/y/c.0", "x/y/c.1", "z", f"{INTERNAL}/lock", "catalog/a~b~c~t050.json"):
        objects.put(key, b"1")
    assert objects.names("") == ["catalog", "x", "z"]
    assert objects.names("x") == ["y", "zarr.json"]
    assert objects.names("x/y") == ["c.0", "c.1"]
    assert objects.names("catalog") == ["a~b~c~t050.json"]
    assert objects.names("nothing") == []
    assert objects.names(INTERNAL) == ["lock"]


def test_keys_cannot_lead_out(objects):
    for key in ("../a", "a/../../b", "/a", "a//b", ""):
        for ask in (objects.get, objects.open, objects.exists, objects.put, objects.delete):
            with pytest.raises(BadRequestError):
                ask(key)


def test_a_bucket_may_be_the_store_itself_or_hold_several(s3):
    stores = [objects_at(f"s3://{s3.name}"), objects_at(f"s3://{s3.name}/a"), objects_at(f"s3://{s3.name}/ab")]
    for number, store in enumerate(stores):
        store.put("k", bytes([number]))
    assert [store.get("k") for store in stores] == [b"\0", b"\1", b"\2"]
    assert stores[0].names("") == ["a", "ab", "k"]
    assert stores[1].names("") == ["k"]


def test_an_object_that_only_marks_a_folder_is_no_name(s3):
    plain = zarr_store(s3, "")
    plain.store.put("team/store/x/", b"")
    objects = objects_at(s3.url)
    objects.put("x/y", b"1")
    assert objects.names("x") == ["y"]


def test_ranges(objects):
    data = np.random.default_rng(0).bytes(3_000_000)
    objects.put("k", data)
    with objects.open("k") as snapshot:
        assert snapshot.read_tail(1000) == data[-1000:]
        assert snapshot.size_bytes == len(data)
        assert snapshot.read(17, 5) == data[17:22]
        places = [(2_999_000, 1000), (0, 10), (5, 10), (700_000, 3), (1_500_000, 100_000), (5, 10)]
        assert read(snapshot, *places) == [data[o : o + n] for o, n in places]
        with pytest.raises(CorruptError, match="ends at byte"):
            snapshot.read(2_999_999, 2)
    with objects.open("k") as snapshot:  # Without the tail, the first range pins the state.
        assert read(snapshot, (10, 10), (2_000_000, 10)) == [data[10:20], data[2_000_000:2_000_010]]
    with objects.open("k") as snapshot, pytest.raises(CorruptError, match="truncated"):
        snapshot.read_tail(len(data) + 1)
    objects.put("k", b"")
    for tail in (1, 0):
        with objects.open("k") as snapshot:
            if tail:
                with pytest.raises(CorruptError, match="truncated"):
                    snapshot.read_tail(1)
            else:
                assert snapshot.read_tail(0) == b""


def test_near_ranges_are_one_request_and_long_ones_several(s3, monkeypatch):
    monkeypatch.setattr(remote_snapshot, "REQUEST_BYTES", 1 << 20)
    data = np.random.default_rng(0).bytes(5 << 20)
    objects = objects_at(s3.url)
    objects.put("k", data)
    with objects.open("k") as snapshot:
        snapshot.read_tail(10)
        s3.proxy.log.clear()
        near = [(1000, 50_000), (200_000, 50_000), (2 << 20, 10)]
        assert read(snapshot, *near) == [data[o : o + n] for o, n in near]
        ranges = sorted(one.headers["range"] for one in s3.proxy.log)
        assert ranges == ["bytes=1000-249999", f"bytes={2 << 20}-{(2 << 20) + 9}"]
        assert len({one.headers["if-match"] for one in s3.proxy.log}) == 1
        s3.proxy.log.clear()
        assert snapshot.read(100, 3 << 20) == data[100 : 100 + (3 << 20)]
        assert len(s3.proxy.log) == 3


def test_requests_of_one_read_are_under_way_together(s3):
    objects = objects_at(s3.url)
    objects.put("k", bytes(4 << 20))
    together = threading.Barrier(4, timeout=5)  # Broken unless four requests meet at it.
    with objects.open("k") as snapshot:
        snapshot.read_tail(1)
        s3.proxy.fail(times=4, method="GET", call=together.wait)
        read(snapshot, *[(number << 20, 10) for number in range(4)])
    assert not together.broken


@pytest.mark.parametrize("conditions", [True, False])
def test_a_snapshot_is_one_state_of_an_object(s3, conditions):
    objects = objects_at(s3.url)
    objects.put("k", b"a" * 1000)
    s3.proxy.strip = () if conditions else ("if-match",)
    with objects.open("k") as snapshot:
        assert snapshot.read_tail(10) == b"a" * 10
        version = snapshot.version
        objects.put("k", b"b" * 1000)
        with pytest.raises(ReplacedError, match="replaced"):
            snapshot.read(0, 10)
    with objects.open("k") as snapshot:
        assert snapshot.version not in (None, version)
        assert snapshot.read(0, 10) == b"b" * 10


def test_a_reader_takes_the_new_shard_when_it_is_replaced_in_the_middle(s3, lab):
    _, run = lab.start(s3.url, 100)
    lab.fill(run, rows=range(40))
    reader = fs.open(s3.url).dataset("toy").runs()[0].reader("up1")
    # Between the index and the image a writer adds the rest of the block: the row stays, its shard does not.
    shard_requests = [1, 2]

    def replace():
        shard_requests.pop()
        if not shard_requests:
            lab.fill(run, rows=range(64))

    s3.proxy.log.clear()
    s3.proxy.fail(times=2, method="GET", path="up1/c.0.0.0.0", call=replace)
    assert np.array_equal(reader.rows([7]), lab.maps_of(run, [7], "up1"))
    assert not shard_requests
    assert s3.proxy.asked().count("GET c.0.0.0.0") >= 4


def test_put_new_has_one_winner(objects):
    with ThreadPoolExecutor(8) as pool:
        for turn in range(5):
            won = list(pool.map(lambda n, turn=turn: objects.put_new(f"lease.{turn}", b"%d" % n), range(8)))
            assert won.count(True) == 1
            assert objects.get(f"lease.{turn}") == b"%d" % won.index(True)
    objects.delete("lease.0")
    assert objects.put_new("lease.0", b"again")


def _try_to_be_first(url, number):
    return objects_at(url).put_new("lease", b"%d" % number)


def test_put_new_has_one_winner_among_processes(s3):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        won = pool.starmap(_try_to_be_first, [(s3.url, number) for number in range(8)])
    assert won.count(True) == 1
    assert objects_at(s3.url).get("lease") == b"%d" % won.index(True)


def test_a_server_without_conditional_puts_is_refused(s3):
    s3.proxy.strip = ("if-none-match",)
    objects = objects_at(s3.url)
    for _ in range(2):
        with pytest.raises(StorageError, match="no create-only puts") as caught:
            objects.put_new("lease", b"1")
        assert "featstore push" in caught.value.hint
    assert not objects.exists("lease")
    with pytest.raises(StorageError, match="no create-only puts"):
        fs.create(s3.url)


def test_a_server_that_says_it_has_none(s3):
    s3.proxy.fail(times=9, method="PUT", status=501)
    with pytest.raises(StorageError, match="501 Not Implemented") as caught:
        objects_at(s3.url).put_new("lease", b"1")
    assert "create-only puts" in caught.value.hint


def test_locks_hold_among_threads(objects):
    inside, most = [], []

    def work(_):
        with objects.lock("x"):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(200)))
    assert max(most) == 1


def test_large_objects_go_up_in_parts(s3):
    data = np.random.default_rng(0).bytes(2 * PART_BYTES + 12345)
    objects = objects_at(s3.url)
    assert objects.put("k", data[:100], memoryview(data)[100:]) == len(data)
    assert sum("partNumber" in one.path for one in s3.proxy.log) == 3
    assert objects.get("k") == data
    with objects.open("k") as snapshot:
        assert snapshot.read(5, len(data) - 5) == data[5:]


def test_a_whole_store(s3, lab, tmp_path):
    lab.full(tmp_path / "local", 100)
    lab.full(s3.url, 100)
    local, remote = (fs.open(url).dataset("toy") for url in (tmp_path / "local", s3.url + "/"))
    assert list(remote.samples.keys) == list(local.samples.keys)
    assert [run.path for run in remote.runs()] == [run.path for run in local.runs()]
    for here, there in zip(local.runs(), remote.runs(), strict=True):
        assert there.valid(list(there.layers)).all()
        for layer in here.layers:
            order = np.random.default_rng(0).permutation(100)
            assert np.array_equal(there.numpy(layer, order), here.numpy(layer, order))
            assert np.array_equal(there[layer].compute(), here[layer].compute())
    report = verify(fs.open(s3.url))
    assert report.ok, report
    assert report.checked_images == 100


def test_a_store_in_memory(lab):
    url = "memory://a-store-in-memory"
    with pytest.raises(NotFoundError, match="no store"):
        fs.open(url)
    lab.full(url, 70)
    run = fs.open(f"{url}/").dataset("toy").runs()[0]
    assert np.array_equal(run.numpy("up1", range(70)), lab.maps_of(run, range(70), "up1"))
    assert verify(fs.open(url)).ok
    with pytest.raises(NotFoundError, match="no store"):
        fs.open("memory://another")


def test_damage_in_a_bucket_is_found_and_repaired(s3, lab):
    _, run = lab.full(s3.url, 70)
    objects = objects_at(s3.url)
    key = f"{run.path}/up1/c.0.0.0.0"
    data = bytearray(objects.get(key))
    data[500] ^= 1
    objects.put(key, bytes(data))
    with pytest.raises(CorruptError, match="damaged at image"):
        run.numpy("up1", range(64))
    assert len(verify(fs.create(s3.url), repair=True).corrupt) == 1
    lab.fill(run)
    assert verify(fs.open(s3.url)).ok


def test_requests_of_a_read(s3, lab):
    """What docs/remote.md says that reading costs."""
    lab.full(s3.url, 8 * 64)
    s3.proxy.log.clear()
    reader = fs.open(s3.url).dataset("toy").run("controlnet:canny+lora").reader("up1")
    assert len(s3.proxy.log) == 7
    s3.proxy.log.clear()
    reader.rows([3])
    assert s3.proxy.asked() == ["GET c.0", "GET c.0.0.0.0", "GET c.0.0.0.0"]
    s3.proxy.log.clear()
    reader.rows(range(5, 8 * 64, 64))
    assert len(s3.proxy.log) == 24
    s3.proxy.log.clear()
    reader.block(0)
    assert len(s3.proxy.log) == 3


def test_blocks_of_a_batch_are_read_together(s3, lab):
    lab.full(s3.url, 100)
    reader = fs.open(s3.url).dataset("toy").runs()[0].reader("up1")
    together = threading.Barrier(2, timeout=5)
    s3.proxy.fail(times=2, method="GET", path="committed/up1/c.", call=together.wait)
    reader.rows([3, 70])
    assert not together.broken


def test_readers_travel_without_secrets(s3, lab, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never-in-a-pickle")
    _, run = lab.full(s3.url, 10)
    reader = run.reader("up1")
    reader.rows([1])
    data = pickle.dumps(reader)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in data
    again = pickle.loads(data)
    assert again.objects.url == s3.url
    assert np.array_equal(again.rows([1, 9]), lab.maps_of(run, [1, 9], "up1"))
    program = "import pickle, sys; print(float(pickle.load(sys.stdin.buffer).rows([1]).astype('f8').sum()))"
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=True, cwd=ROOT)
    assert float(done.stdout) == reader.rows([1]).astype("f8").sum()


def test_a_thousand_tasks_share_one_client(s3):
    objects = objects_at(s3.url)
    copies = [pickle.loads(pickle.dumps(objects)) for _ in range(3)]
    assert len({id(one._connection) for one in [objects, *copies]}) == 1


def test_a_forked_process_is_told_instead_of_hanging(s3):
    objects = objects_at(s3.url)
    objects.put("k", b"1")
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            objects.get("k")
            said = "it went through"
        except StorageError as error:
            said = f"{error} {error.hint}"
        finally:
            os.write(sender, said.encode())
            os._exit(0)
    os.close(sender)
    said = b""
    while part := os.read(receiver, 4096):
        said += part
    os.close(receiver)
    os.waitpid(child, 0)
    assert b"forked" in said
    assert b"spawn" in said


def zarr_store(s3, path):
    from obstore.store import S3Store

    store = S3Store(s3.name, prefix=path or None, client_options={"allow_http": True})
    return zarr.storage.ObjectStore(store, read_only=bool(path))


def test_plain_zarr_opens_it(s3, lab):
    _, run = lab.full(s3.url, 100)
    root = zarr.open_group(zarr_store(s3, "team/store"), mode="r")
    assert np.array_equal(root[f"{run.path}/up1"][:], run.numpy("up1", range(100)))
    assert (root[f"{run.path}/committed/up1"][:] == run.committed("up1")).all()
    assert json.loads(objects_at(s3.url).get("catalog.json"))["datasets"] == {"toy": 100}

"""A server that fails: what passes is waited for, what does not is said in one line."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

import featstore.store as fs
from featstore.errors import NotFoundError, StorageError
from featstore.store import remote_connection
from featstore.store.remote import PART_BYTES
from featstore.store.remote_config import RemoteConfig
from featstore.store.urls import objects_at
from featstore.store.verify import verify
from tests.store.s3_server import Fault

DATA = np.random.default_rng(0).bytes(200_000)
BIG = np.random.default_rng(1).bytes(2 * PART_BYTES + 1)

FAULTS = {
    "500": {"status": 500},
    "500 though it was done": {"status": 500, "pass_on": True},
    "503 slow down": {
        "status": 503,
        "body": b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>",
    },
    "429": {"status": 429},
    "408": {"status": 408},
    "dropped connection": {"drop": True},
    "dropped though it was done": {"drop": True, "pass_on": True},
    "no answer in time": {"delay_seconds": 1},
    "body cut off": {"cut_bytes": 1000},
    "no body": {"cut_bytes": 0},
    "slow body": {"pause_seconds": 0.02},
    "stalled body": {"pause_seconds": 1},
}


@pytest.fixture(autouse=True)
def _quick(s3, monkeypatch):
    monkeypatch.setenv("FEATSTORE_REMOTE_TIMEOUT_SECONDS", "0.4")
    monkeypatch.setattr(remote_connection, "_BACKOFF_SECONDS", 0.01)


@pytest.fixture
def objects(s3):
    found = objects_at(s3.url)
    found.put("k", DATA)
    assert found.put_new("probe", b"1")  # The server is known to have conditional puts.
    s3.proxy.reset()
    return found


def read_ranges(objects):
    with objects.open("k") as snapshot:
        tail = snapshot.read_tail(50_000)
        return snapshot.read(0, len(DATA) - 50_000) + tail


@pytest.mark.parametrize("fault", FAULTS)
def test_reads_recover(s3, objects, fault):
    for ask, want in (
        (read_ranges, DATA),
        (lambda o: o.get("k"), DATA),
        (lambda o: o.exists("k"), True),
        (lambda o: o.size_bytes("k"), len(DATA)),
        (lambda o: o.names(""), ["k", "probe"]),
    ):
        planned = s3.proxy.fail(times=2, **FAULTS[fault])
        assert ask(objects) == want
        s3.proxy.faults.remove(planned)


@pytest.mark.parametrize("fault", [name for name in FAULTS if "body" not in name])
def test_writes_recover(s3, objects, fault):
    s3.proxy.fail(times=2, method="PUT", **FAULTS[fault])
    objects.put("k", b"new")
    assert objects.get("k") == b"new"
    s3.proxy.fail(times=2, method="DELETE", **FAULTS[fault])
    objects.delete("k")
    assert not objects.exists("k")


@pytest.mark.parametrize("fault", [name for name in FAULTS if "body" not in name])
def test_a_create_only_put_knows_its_own_object_after_a_lost_answer(s3, objects, fault):
    s3.proxy.fail(times=2, method="PUT", **FAULTS[fault])
    assert objects.put_new("lease", b"mine")
    assert objects.get("lease") == b"mine"
    s3.proxy.fail(times=2, method="PUT", **FAULTS[fault])
    assert not objects.put_new("lease", b"yours")
    assert objects.get("lease") == b"mine"


def test_a_create_only_put_that_met_another_one_is_tried_again(s3, objects):
    """409 says that a put of the same key was under way, and not that there is an object."""
    s3.proxy.fail(times=2, method="PUT", status=409, body=b"<Error><Code>ConditionalRequestConflict</Code></Error>")
    assert objects.put_new("lease", b"mine")
    assert objects.get("lease") == b"mine"


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "uploads"), ("PUT", "partNumber=1"), ("PUT", "partNumber=3"), ("POST", "uploadId")]
)
@pytest.mark.parametrize("fault", ["500", "500 though it was done", "dropped connection", "no answer in time"])
def test_large_uploads_recover(s3, objects, method, path, fault):
    s3.proxy.fail(method=method, path=path, **FAULTS[fault])
    objects.put("k", BIG)
    assert objects.get("k") == BIG


def patient_for(seconds, s3):
    """Objects with another patience, of which the proxy then forgets what they asked."""
    return objects_at(s3.url).__class__(s3.url, RemoteConfig(timeout_seconds=0.5, retry_seconds=seconds))


@pytest.mark.parametrize("fault", ["500", "503 slow down", "dropped connection", "no answer in time", "body cut off"])
def test_reads_give_up_with_what_to_do(s3, objects, fault):
    said = {
        "500": "the server answered 500 Internal Server Error (Injected)",
        "503 slow down": "the server answered 503 Service Unavailable (SlowDown: Reduce your rate)",
        "dropped connection": "the connection was dropped",
        "no answer in time": "it timed out",
        "body cut off": "the answer was cut off",
    }[fault]
    objects = patient_for(1, s3)
    s3.proxy.fail(times=10**6, method="GET", **FAULTS[fault])
    begin = time.monotonic()
    with pytest.raises(StorageError) as caught:
        objects.get("k")
    assert time.monotonic() - begin < 10
    message = str(caught.value)
    assert message.startswith(f"cannot read '{s3.url}/k': {said} (")
    assert "\n" not in message
    assert f"({len(s3.proxy.log)} attempts in 1 s)" in message or f"({len(s3.proxy.log)} attempts in 0 s)" in message
    assert len(s3.proxy.log) > 1
    assert "run the same command again" in caught.value.hint


@pytest.mark.parametrize("data", [b"new", BIG], ids=["small", "large"])
def test_a_put_that_fails_leaves_the_old_object(s3, objects, data):
    objects = patient_for(0.5, s3)
    for fault in ({"status": 500}, {"drop": True}):
        s3.proxy.fail(times=10**6, method="PUT", path="/k", **fault)
        with pytest.raises(StorageError, match=r"cannot write .*attempts"):
            objects.put("k", data)
        s3.proxy.reset()
        assert objects.get("k") == DATA
        assert objects.names("") == ["k", "probe"]


def test_a_large_put_that_fails_at_its_end_leaves_the_old_object(s3, objects):
    objects = patient_for(0.5, s3)
    s3.proxy.fail(times=10**6, method="POST", path="uploadId", status=500)
    with pytest.raises(StorageError, match="500"):
        objects.put("k", BIG)
    assert objects.get("k") == DATA
    assert any(one.method == "DELETE" and "uploadId" in one.path for one in s3.proxy.log)  # The parts are not left.


def test_patience_is_measured_over_all_tries(s3, objects):
    objects = patient_for(0, s3)
    s3.proxy.fail(status=500)
    with pytest.raises(StorageError, match=r"\(1 attempts in 0 s\)"):
        objects.get("k")
    assert objects.get("k") == DATA


def test_a_range_that_answers_with_another_one_is_not_taken(s3, objects):
    """A cache in between that has only a part."""
    with objects.open("k") as snapshot:
        snapshot.read_tail(10)
        s3.proxy.fail(method="GET", shorten_bytes=5)
        assert snapshot.read(0, 100) == DATA[:100]
    assert len(s3.proxy.log) == 3


def test_a_store_made_over_a_bad_line_is_right(s3, lab, capsys):
    """One request of eight fails in one way or another while a store is made, read and verified."""
    rng = np.random.default_rng(0)
    kinds = [FAULTS[name] for name in ("500", "500 though it was done", "dropped connection", "body cut off", "429")]
    hit = []

    def choose(request):
        if rng.random() > 1 / 8:
            return None
        hit.append(request)
        return Fault(**kinds[len(hit) % len(kinds)])

    s3.proxy.choose = choose
    _, run = lab.full(s3.url, 100)
    reader = fs.open(s3.url).dataset("toy").runs()[0]
    for layer in run.layers:
        assert np.array_equal(reader.numpy(layer, range(100)), lab.maps_of(run, range(100), layer))
    report = verify(fs.open(s3.url))
    assert report.ok, report
    assert len(hit) > 10
    with capsys.disabled():
        sys.stdout.write(f"\n{len(s3.proxy.log)} requests, {len(hit)} of them spoiled, every byte right\n")


def test_a_key_that_is_not_there_is_not_waited_for(s3, objects):
    for ask in (objects.get, lambda key: objects.open(key).read_tail(4)):
        s3.proxy.log.clear()
        with pytest.raises(NotFoundError):
            ask("nothing")
        assert len(s3.proxy.log) == 1

"""Logs of extractions: complete, small, readable while they grow, and never in the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

import featstore.store
from featstore.errors import BadRequestError, NotFoundError, StorageError
from featstore.store import partial, run_log
from featstore.store.local import LocalObjects
from featstore.store.objects import INTERNAL
from featstore.store.run_log import FOLDER, MAX_FAILED, RunLog
from featstore.store.run_log_lines import MAX_LINE_BYTES, Lines, line
from featstore.store.run_logs import find_log, log_entries, log_entry, log_ids, log_lines
from featstore.store.verify import verify
from tests.store.fake_remote import FakeRemote


@pytest.fixture(params=["local", "remote"])
def objects(request, tmp_path):
    return LocalObjects(tmp_path) if request.param == "local" else FakeRemote()


def of_kind(objects, name, kind):
    return [one for one in log_lines(objects, name) if one["kind"] == kind]


def size_bytes(objects, name):
    folder = f"{FOLDER}/{name}"
    return sum(objects.size_bytes(f"{folder}/{part}") for part in objects.names(folder))


def test_a_log_says_what_was_asked_what_happened_and_what_came_of_it(objects):
    with RunLog(objects, {"command": "featstore extract"}) as log:
        log.event("block", worker="a", passes=8)
        log.event("failed", key="x.png", reason="no picture")
        log.conclude(computed=8)
    (entry,) = log_entries(objects, limit=5)
    assert (entry.id, entry.state, entry.facts["outcome"]) == (log.id, "done", "done")
    assert entry.facts["computed"] == 8
    assert entry.facts["command"] == "featstore extract"
    assert entry.facts["pid"] == os.getpid()
    assert entry.facts["failed"] == {"count": 1, "images": [{"key": "x.png", "reason": "no picture"}]}
    assert [one["kind"] for one in log_lines(objects, log.id)] == ["start", "block", "failed", "end"]
    (block,) = of_kind(objects, log.id, "block")
    assert (block["worker"], block["passes"]) == ("a", 8)


@pytest.mark.parametrize(("error", "state"), [(ValueError("no"), "failed"), (KeyboardInterrupt(), "interrupted")])
def test_how_it_ended_is_said(objects, error, state):
    with pytest.raises(type(error)), RunLog(objects, {}):
        raise error
    (entry,) = log_entries(objects, limit=1)
    assert entry.state == state
    assert entry.facts["error"].startswith(type(error).__name__)


def test_parts_come_while_it_goes_on_and_nothing_is_ever_replaced(objects, monkeypatch):
    created = []
    put_new = type(objects).put_new

    def noted(self, key, *buffers, durable=True):
        created.append(key)
        return put_new(self, key, *buffers, durable=durable)

    monkeypatch.setattr(type(objects), "put_new", noted)
    monkeypatch.setattr(type(objects), "put", None if isinstance(objects, LocalObjects) else put_new)
    seen = threading.Event()
    with RunLog(objects, {}, part_seconds=0.02) as log:
        log.event("block", passes=1)
        deadline = time.monotonic() + 30
        while not of_kind(objects, log.id, "block") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert log_entry(objects, log.id).state == "running"
        seen.set()
    assert len(created) == len(set(created))
    assert len(of_kind(objects, log.id, "block")) == 1


def flushed(log, blocks):
    """One part with some blocks, without waiting for its time."""
    for number in range(blocks):
        log.event("block", worker=f"w{number % 64}", passes=8, seconds=0.5)
    log._flush()


def test_an_hour_of_parts_becomes_one_object_and_nothing_is_lost_or_told_twice(objects):
    with RunLog(objects, {}) as log:
        for _ in range(130):
            flushed(log, 1)
        assert objects.names(f"{FOLDER}/{log.id}")[:2] == ["000000-000059.jsonl", "000060-000119.jsonl"]
        assert len(objects.names(f"{FOLDER}/{log.id}")) == 2 + 11
    assert len(of_kind(objects, log.id, "block")) == 130


def test_parts_that_a_killed_process_did_not_delete_are_passed_over(objects):
    with RunLog(objects, {}) as log:
        for _ in range(59):
            flushed(log, 1)
        objects.put(f"{FOLDER}/{log.id}/000003.jsonl", line({"kind": "block", "time": ""}))
        objects.put(f"{FOLDER}/{log.id}/others.txt", b"block")
    assert len(of_kind(objects, log.id, "block")) == 59


def test_a_million_blocks_take_little_room_and_still_add_up(told):
    """Ten hours at 28 blocks a second from 64 workers: 600 parts of 1,667 blocks."""
    objects = FakeRemote()
    with RunLog(objects, {}) as log:
        for _ in range(600):
            flushed(log, 1667)
    blocks = of_kind(objects, log.id, "block")
    assert sum(one.get("count", 1) for one in blocks) == 600 * 1667
    assert sum(one["sum"]["passes"] if "sum" in one else one["passes"] for one in blocks) == 600 * 1667 * 8
    assert {one["worker"] for one in blocks} == {f"w{number}" for number in range(64)}
    assert size_bytes(objects, log.id) < 2 << 20
    told(f"a log of 1,000,200 blocks: {size_bytes(objects, log.id)} bytes, {len(objects.names(FOLDER + '/' + log.id))}")


def test_a_million_failed_images_are_counted_and_some_are_named(tmp_path):
    objects = LocalObjects(tmp_path)
    with RunLog(objects, {}) as log:
        for number in range(5000):
            log.event("failed", key=f"{number}.png", reason="x" * 2000)
    failed = log_entry(objects, log.id).facts["failed"]
    assert failed["count"] == 5000
    assert [one["key"] for one in failed["images"]] == [f"{number}.png" for number in range(MAX_FAILED)]
    assert size_bytes(objects, log.id) < 1 << 20


class Broken(FakeRemote):
    """A place that takes nothing."""

    def put_new(self, key, *buffers, durable=True):
        raise StorageError("the disk is full")


def test_a_log_that_cannot_be_written_is_said_once_and_stops_nothing():
    notes = []
    with RunLog(Broken(), {}, note=notes.append, part_seconds=0.01) as log:
        for _ in range(5):
            log.event("block", passes=1)
            time.sleep(0.02)
    assert len(notes) == 1
    assert "does not stop it: the disk is full" in notes[0]


def test_events_of_many_threads_all_arrive(objects):
    with RunLog(objects, {}, part_seconds=0.01) as log:
        threads = [
            threading.Thread(target=lambda: [log.event("block", passes=1) for _ in range(200)]) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(one.get("count", 1) for one in of_kind(objects, log.id, "block")) == 1600


def test_what_json_cannot_say_is_said_as_text():
    assert json.loads(line({"x": float("nan")})) == {"x": "nan"}
    assert json.loads(
        line(
            {
                "x": {
                    1,
                },
                "y": 1,
            }
        )
    ) == {"x": "{1}", "y": 1}
    long = json.loads(line({"x": "a" * MAX_LINE_BYTES, "n": 3}))
    assert (long["n"], long["cut"]) == (3, True)
    assert len(long["x"]) < 1000


def test_lines_beyond_the_first_are_added_up_for_each_worker():
    lines = Lines(1)
    for number in range(1, 6):
        lines.add(f"t{number}", "block", {"worker": "a" if number % 2 else "b", "passes": number, "ok": True})
    first, *rest = [json.loads(one) for one in lines.body().splitlines()]
    assert first == {"time": "t1", "kind": "block", "worker": "a", "passes": 1, "ok": True}
    assert rest == [
        {"time": time, "kind": "block", "worker": worker, "count": 2, "since": since, "sum": one, "max": most}
        for time, worker, since, one, most in (
            ("t4", "b", "t2", {"passes": 6}, {"passes": 4}),
            ("t5", "a", "t3", {"passes": 8}, {"passes": 5}),
        )
    ]


KILLED = """
import os, signal, sys, time
from pathlib import Path
from featstore.store.local import LocalObjects
from featstore.store.run_log import RunLog
with RunLog(LocalObjects(Path(sys.argv[1])), {"command": "c"}, part_seconds=0.02) as log:
    log.event("block", passes=3)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_its_parts_and_is_known_to_be_gone(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=False)
    objects = LocalObjects(tmp_path)
    (entry,) = log_entries(objects, limit=3)
    assert (entry.state, entry.facts["command"]) == ("killed", "c")
    assert [one["passes"] for one in of_kind(objects, entry.id, "block")] == [3]


def test_one_of_another_machine_is_running_as_long_as_it_is_heard_of(tmp_path, monkeypatch):
    objects = LocalObjects(tmp_path)
    log = RunLog(objects, {})
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(partial, "place", lambda: "0" * 12)
        log = RunLog(objects, {})
    log.event("start", **log._who)
    log._flush()
    assert log_entry(objects, log.id).state == "running"
    monkeypatch.setattr("featstore.store.run_logs._SILENT_SECONDS", 0.0)
    assert log_entry(objects, log.id).state == "killed"


def test_the_newest_come_first_and_each_is_found_by_a_part_of_its_name(objects, monkeypatch):
    names = ["20260101T000000.000Z-0000000a", "20260102T000000.000Z-0000000b", "20260102T000000.001Z-0000000c"]
    for name in names:
        objects.put(f"{FOLDER}/{name}/summary.json", json.dumps({"outcome": "done", "id": name}).encode())
    objects.put(f"{FOLDER}/not-a-log/summary.json", b"{}")
    assert log_ids(objects) == names[::-1]
    assert [one.id for one in log_entries(objects, limit=2)] == names[:0:-1]
    assert find_log(objects, "0000000b") == names[1]
    assert find_log(objects, "20260101") == names[0]
    for wrong in ("20260102", "zzz", ""):
        with pytest.raises(BadRequestError, match="unknown log"):
            find_log(objects, wrong)


def test_a_store_without_logs_says_so(tmp_path):
    assert log_entries(LocalObjects(tmp_path), limit=5) == []
    with pytest.raises(NotFoundError, match="has no logs"):
        find_log(LocalObjects(tmp_path), "x")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"outcome": 3, "plan": [], "failed": 7}', b"\xff\xfe", b"[" * 100_000]
)
def test_a_strangers_summary_is_data(objects, body):
    name = "20260101T000000.000Z-0000000a"
    objects.put(f"{FOLDER}/{name}/summary.json", body)
    objects.put(f"{FOLDER}/{name}/000000.jsonl", body + b"\n" + line({"kind": "start", "time": "never", "pid": "x"}))
    assert log_entry(objects, name).state == "killed"
    assert [one["kind"] for one in log_lines(objects, name) if "kind" in one] == ["start"]


def test_logs_are_no_orphans_and_no_part_of_what_a_store_holds(tmp_path):
    store = featstore.store.create(tmp_path / "s.zarr")
    with RunLog(store.objects, {}):
        pass
    assert (tmp_path / "s.zarr" / INTERNAL / "log").is_dir()
    report = verify(featstore.store.open(tmp_path / "s.zarr"))
    assert report.ok
    assert store.datasets() == []
    assert run_log.FOLDER.startswith(INTERNAL)


def test_a_log_in_a_bucket(s3):
    store = featstore.store.create(s3.url)
    with RunLog(store.objects, {"command": "c"}) as log:
        for _ in range(61):
            flushed(log, 2)
    again = featstore.store.open(s3.url).objects
    (entry,) = log_entries(again, limit=5)
    assert (entry.id, entry.state) == (log.id, "done")
    assert len(of_kind(again, log.id, "block")) == 122
    assert "000000-000059.jsonl" in again.names(f"{FOLDER}/{log.id}")
    assert "000000.jsonl" not in again.names(f"{FOLDER}/{log.id}")

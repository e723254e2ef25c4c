"""Unfinished files of writers that died, and objects that are put whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

import featstore.store as fs
from featstore.errors import BadRequestError, NotFoundError
from featstore.store import partial
from featstore.store.local import LocalObjects
from featstore.store.objects import INTERNAL

DAY = 24 * 3600.0


@pytest.fixture
def child():
    """A living process and the name that it gives to an unfinished file."""
    code = "import sys, featstore.store.partial as p; print(p.new_name(), flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def test_the_file_of_a_living_writer_stays_and_goes_when_it_is_dead(tmp_path, lab, child):
    process, name = child
    lab.start(tmp_path / "s", 3)
    path = tmp_path / "s" / INTERNAL / name
    path.write_bytes(b"half a shard")
    os.utime(path, (time.time() - 100 * DAY,) * 2)
    fs.open(tmp_path / "s")
    fs.create(tmp_path / "s")
    assert path.exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    fs.open(tmp_path / "s")
    assert path.exists()
    fs.create(tmp_path / "s")
    assert not path.exists()


def test_a_process_id_that_was_given_again_does_not_keep_a_file(child):
    _, name = child
    place, pid, start, rest = name.split("-")
    assert int(start) == partial.started(int(pid)) > 0
    assert not partial.abandoned(name, 9 * DAY)
    assert partial.abandoned(f"{place}-{pid}-{int(start) - 1}-{rest}", 0)


def test_elsewhere_age_decides(child):
    _, name = child
    foreign = "0" * 12 + name[12:]
    assert not partial.abandoned(foreign, 0.9 * DAY)
    assert partial.abandoned(foreign, 1.1 * DAY)


def test_what_is_not_ours_stays(tmp_path):
    for name in ("notes.txt", "x.partial", "lock-00"):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (0, 0))
    assert partial.sweep(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 3
    assert partial.sweep(tmp_path / "absent") == []


def test_put_replaces_whole_and_an_open_object_stays_as_it_was(tmp_path):
    objects = LocalObjects(tmp_path)
    assert objects.put("a/b", b"old ", b"", memoryview(b"value")) == 9
    with objects.open("a/b") as snapshot:
        objects.put("a/b", b"new")
        assert snapshot.read(0, snapshot.size_bytes) == b"old value"
    assert objects.get("a/b") == b"new"
    with objects.open("a/b") as snapshot:
        assert snapshot.read(1, 2) == b"ew"
        assert snapshot.read_tail(2) == b"ew"
    assert objects.names("a") == ["b"]
    objects.delete("a/b")
    objects.delete("a/b")
    assert not objects.exists("a/b")
    with pytest.raises(NotFoundError):
        objects.get("a/b")
    assert list((tmp_path / INTERNAL).iterdir()) == []


def test_many_buffers_are_written_in_order(tmp_path):
    pieces = [bytes([i % 251]) * (i % 7) for i in range(5000)]
    LocalObjects(tmp_path).put("x", *pieces)
    assert LocalObjects(tmp_path).get("x") == b"".join(pieces)
    got = [bytearray(len(piece)) for piece in pieces]
    with LocalObjects(tmp_path).open("x") as snapshot:
        snapshot.read_into(0, [memoryview(buffer) for buffer in got])
    assert b"".join(got) == b"".join(pieces)


def test_put_new_has_one_winner(tmp_path):
    objects = LocalObjects(tmp_path)
    assert objects.put_new("k", b"1")
    assert not objects.put_new("k", b"2")
    assert objects.get("k") == b"1"
    code = (
        "import sys, featstore.store.local as o, pathlib; sys.stdin.read();"
        f"print(o.LocalObjects(pathlib.Path({str(tmp_path)!r})).put_new('race', sys.argv[1].encode() * 100000))"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", code, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    time.sleep(1)
    won = [racer.communicate("")[0].strip() for racer in racers]
    assert sorted(won) == ["False", "False", "True"]
    assert objects.get("race") == str(won.index("True")).encode() * 100000


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "a//b", "", "a/./b", "a\0b"])
def test_keys_cannot_leave_the_folder(tmp_path, key):
    objects = LocalObjects(tmp_path / "s")
    for call in (objects.get, objects.exists, objects.delete, lambda k: objects.put(k, b"x")):
        with pytest.raises(BadRequestError):
            call(key)
    assert list(tmp_path.iterdir()) == []

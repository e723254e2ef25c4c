from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading

import pytest

from featstore.whole_file import write_whole

LENGTH = 1 << 20


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


WRITE_OFTEN = f"""
import pathlib, sys
from featstore.whole_file import write_whole
for _ in range(40):
    write_whole(pathlib.Path(sys.argv[1]), sys.argv[2].encode() * {LENGTH}, durable=False)
"""


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_made_and_replaced(tmp_path, durable):
    path = tmp_path / "a.json"
    for content in (b"first", b"", memoryview(b"third")):
        write_whole(path, content, durable=durable)
        assert path.read_bytes() == content
        assert contents(tmp_path) == ["a.json"]


def test_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("é" * 127)
    write_whole(path, b"x")
    assert path.read_bytes() == b"x"


def test_a_durable_file_reaches_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    steps = []

    def synced(handle):
        kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
        steps.append((f"sync {kind}", (tmp_path / "a").exists()))

    monkeypatch.setattr(os, "fsync", synced)
    write_whole(tmp_path / "a", b"x")
    assert steps == [("sync file", False), ("sync folder", True)]
    write_whole(tmp_path / "b", b"x", durable=False)
    assert len(steps) == 2


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_mode_follows_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


def test_writers_of_one_path_and_a_reader_see_whole_files(tmp_path):
    path = tmp_path / "shared"
    write_whole(path, b"a" * LENGTH)
    processes = [subprocess.Popen([sys.executable, "-c", WRITE_OFTEN, path, letter]) for letter in "bc"]
    threads = [threading.Thread(target=write_whole, args=(path, letter * LENGTH)) for letter in (b"d", b"e") * 20]
    for thread in threads:
        thread.start()
    seen = set()
    while any(process.poll() is None for process in processes) or any(thread.is_alive() for thread in threads):
        content = path.read_bytes()
        assert len(content) == LENGTH
        assert content.count(content[:1]) == LENGTH
        seen.add(content[:1])
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0]
    assert len(seen) > 1
    assert contents(tmp_path) == ["shared"]


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """The limit on a process's files stands in for the end of the disk: a write is cut short, the next one fails."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = f"""
import pathlib, resource, signal
from featstore.whole_file import write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    write_whole(pathlib.Path({str(path)!r}), b"n" * {LENGTH})
except OSError as error:
    print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(errno.EFBIG)]
    assert path.read_bytes() == b"old"
    assert contents(tmp_path) == ["a"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(errno.EIO, "I/O error"), MemoryError])
def test_whatever_interrupts_it_nothing_partial_is_left(tmp_path, monkeypatch, failure):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(_):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(failure if isinstance(failure, type) else OSError):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert contents(tmp_path) == ["a"]


@pytest.mark.parametrize("path", ["absent/a", "file/a", "folder"])
def test_a_place_that_cannot_be_written_is_an_os_error(tmp_path, path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):  # noqa: PT011 - each system has its own for a folder in the way
        write_whole(tmp_path / path, b"x")
    assert contents(tmp_path) == ["file", "folder"]

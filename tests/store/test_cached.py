"""A remote store read through a local cache: fewer requests, never other bytes."""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import featstore.store as fs
from featstore.errors import BadRequestError, CorruptError, NotCommittedError, NotFoundError, StorageError
from featstore.store import pages
from featstore.store.cached import CachedObjects, through_cache
from featstore.store.local import LocalObjects
from featstore.store.objects import Objects, Snapshot
from featstore.store.pages import PAGE_BYTES, PageCache

KEY = "toy/reference/basic-00000000/t050/up1/c.0.0.0.0"


class Remote(Objects):
    """Objects in memory that count what is asked of them; a version of an object is a number of its own."""

    parallel_reads = 8

    def __init__(self, objects=(), url="s3://team/features"):
        super().__init__(url)
        self.objects = {key: (data, str(i)) for i, (key, data) in enumerate(dict(objects).items())}
        self.reads = collections.Counter()
        self.opened = collections.Counter()
        self.versions = True

    def replace(self, key, data):
        self.objects[key] = (data, str(len(self.objects) + int(self.objects[key][1])))

    def open(self, key):
        if key not in self.objects:
            raise NotFoundError(f"there is no {key!r}")
        self.opened[key] += 1
        return RemoteSnapshot(self, key)

    def exists(self, key):
        return key in self.objects

    def size_bytes(self, key):
        return len(self.objects[key][0]) if key in self.objects else 0

    def names(self, folder):
        prefix = f"{folder}/" if folder else ""
        return sorted({key[len(prefix) :].split("/")[0] for key in self.objects if key.startswith(prefix)})

    def put(self, key, *buffers, durable=True):
        raise AssertionError("nothing is written through a store that is opened for reading")

    put_new = delete = put

    def lock(self, name):
        return contextlib.nullcontext()

    def require_writable(self):
        raise StorageError("read-only")


class RemoteSnapshot(Snapshot):
    def __init__(self, remote, key):
        self._remote, self._key = remote, key
        self._data, version = remote.objects[key]
        self.size_bytes = len(self._data)
        self.version = version if remote.versions else None

    def close(self):
        pass

    def read_into(self, offset, buffers):
        for buffer in buffers:
            part = self._data[offset : offset + buffer.nbytes]
            if len(part) < buffer.nbytes:
                raise CorruptError("it ends before that")
            buffer[:] = part
            self._remote.reads[self._key] += len(part)
            offset += len(part)


def noise(length, seed=0):
    return np.random.default_rng(seed).bytes(length)


def on_disk(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def page_files(folder):
    return sorted(path for path in Path(folder).rglob("*-*") if path.is_file())


def take(objects, offset, length, key=KEY):
    with objects.open(key) as snapshot:
        return snapshot.read(offset, length)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def remote_store(lab, tmp_path):
    """A store of 100 images in a remote place, and the run in it."""
    lab.full(tmp_path / "s.zarr")
    return Remote(lab.files(tmp_path / "s.zarr"))


def opened(objects):
    dataset = fs.Store(objects.url, objects, writable=False).dataset("toy")
    return dataset.runs()[0]


def shards_read(remote):
    return {key: n for key, n in remote.reads.items() if key.endswith(".0.0.0")}


def test_the_second_epoch_reads_no_shard_from_the_remote(remote_store, folder, lab):
    run = opened(CachedObjects(remote_store, folder))
    first = {layer: run.numpy(layer, range(100)) for layer in run.layers}
    assert len(shards_read(remote_store)) == 4
    remote_store.reads.clear()
    for layer in run.layers:
        shuffled = np.random.default_rng(1).permutation(100)
        np.testing.assert_array_equal(run.numpy(layer, shuffled), first[layer][shuffled])
        np.testing.assert_array_equal(run[layer].compute(), first[layer])
        np.testing.assert_array_equal(first[layer], lab.maps_of(run, range(100), layer))
    assert shards_read(remote_store) == {}
    assert run.dataset.objects.use.hit_bytes > 0
    again = opened(CachedObjects(remote_store, folder))  # as another process would
    np.testing.assert_array_equal(again.numpy("up1", range(100)), first["up1"])
    assert shards_read(remote_store) == {}


@pytest.mark.parametrize("changes", [{}, {"precision": "int8"}])
def test_a_real_remote_whose_images_change(lab, folder, changes):
    url = f"memory://changing-{changes.get('precision')}"
    lab.full(url, n=70, **changes)
    stored = fs.open(url, cache=folder)
    for _ in range(2):
        run = stored.dataset("toy").runs()[0]
        before = run.numpy("up1", range(70))
        np.testing.assert_array_equal(before, fs.open(url).dataset("toy").runs()[0].numpy("up1", range(70)))
    assert stored.objects.use.hit_bytes > 0
    assert len(page_files(folder)) == (4 if changes else 2)  # int8 has scales beside the maps
    lab.fill(lab.start(url, n=70, changed=(3,), **changes)[1])
    after = stored.dataset("toy").runs()[0].numpy("up1", range(70))
    assert [row for row in range(70) if not np.array_equal(after[row], before[row])] == [3]


def test_records_always_come_from_the_remote(remote_store, folder):
    run = opened(CachedObjects(remote_store, folder))
    run.numpy("up1", [5])
    key = next(key for key in remote_store.objects if key.endswith("committed/up1/c.0"))
    remote_store.objects.pop(key)
    with pytest.raises(NotCommittedError):
        run.numpy("up1", [5])


def test_any_stretch_equals_the_bytes_it_stands_for_in_any_order_and_state_of_the_cache(folder):
    data = noise(5 * PAGE_BYTES + 12345)
    remote = Remote({KEY: data})
    cached = CachedObjects(remote, folder, limit_bytes=4 << 20)
    rng = np.random.default_rng(3)
    for _ in range(60):
        with cached.open(KEY) as snapshot:
            extents, wanted = [], []
            for _ in range(rng.integers(1, 5)):
                offset = int(rng.integers(0, len(data)))
                lengths = rng.integers(0, 2 * PAGE_BYTES // 3, rng.integers(1, 4)).tolist()
                lengths = [n for i, n in enumerate(lengths) if offset + sum(lengths[: i + 1]) <= len(data)]
                buffers = [bytearray(n) for n in lengths]
                extents.append((offset, [memoryview(buffer) for buffer in buffers]))
                wanted.append((offset, buffers))
            snapshot.read_many(extents)
            for offset, buffers in wanted:
                assert b"".join(buffers) == data[offset : offset + sum(map(len, buffers))]
            assert snapshot.read_tail(1000) == data[-1000:]


def test_an_epoch_in_random_order_fetches_each_byte_once(folder):
    data = noise(3 * PAGE_BYTES)
    remote = Remote({KEY: data})
    cached = CachedObjects(remote, folder)
    for place in np.random.default_rng(0).permutation(48).tolist():
        take(cached, place * (len(data) // 48), len(data) // 48)
    assert remote.reads[KEY] == len(data)
    assert cached.use.missed_bytes == len(data)


def test_an_object_that_was_replaced_is_fetched_anew(folder):
    old, new = noise(5000), noise(5000, seed=1)
    remote = Remote({KEY: old})
    cached = CachedObjects(remote, folder)
    with cached.open(KEY) as before:
        assert take(cached, 0, 5000) == old
        remote.replace(KEY, new)
        assert take(cached, 0, 5000) == new
        assert before.read(0, 5000) == old  # which it was when it was opened
    remote.replace(KEY, new[:4000])
    assert take(cached, 0, 4000) == new[:4000]
    with cached.open(KEY) as snapshot, pytest.raises(CorruptError):
        snapshot.read(0, 4001)


def test_equal_keys_and_versions_of_two_stores_are_told_apart(folder):
    one, other = Remote({KEY: noise(100)}, "s3://a"), Remote({KEY: noise(100, seed=1)}, "s3://b")
    assert take(CachedObjects(one, folder), 0, 100) == noise(100)
    assert take(CachedObjects(other, folder), 0, 100) == noise(100, seed=1)


def test_what_has_no_version_is_not_cached(folder):
    remote = Remote({KEY: noise(100)})
    remote.versions = False
    cached = CachedObjects(remote, folder)
    assert take(cached, 0, 100) == take(cached, 0, 100) == noise(100)
    assert remote.reads[KEY] == 200
    assert page_files(folder) == []


@pytest.mark.parametrize("place", ["magic", "checksum", "identity", "number", "first", "last"])
def test_a_flipped_bit_in_the_cache_is_fetched_anew(folder, place):
    data = noise(70_000)
    remote = Remote({KEY: data})
    cached = CachedObjects(remote, folder)
    take(cached, 0, 10)
    (file,) = page_files(folder)
    sound = file.read_bytes()
    at = {"magic": 0, "checksum": 5, "identity": 10, "number": 30, "first": 36, "last": len(sound) - 1}[place]
    file.write_bytes(sound[:at] + bytes([sound[at] ^ 4]) + sound[at + 1 :])
    remote.reads.clear()
    assert take(cached, 0, len(data)) == data
    assert remote.reads[KEY] == len(data)
    assert file.read_bytes() == sound
    remote.reads.clear()
    assert take(cached, 0, len(data)) == data
    assert remote.reads[KEY] == 0


@pytest.mark.parametrize("damage", ["empty", "cut", "longer", "zeros", "another page", "a folder"])
def test_a_file_of_the_cache_that_is_not_what_it_should_be_is_not_served(folder, damage):
    data = noise(PAGE_BYTES + 100)
    cached = CachedObjects(Remote({KEY: data}), folder)
    assert take(cached, 0, len(data)) == data
    first, second = page_files(folder)
    sound = first.read_bytes()
    if damage == "a folder":
        first.unlink()
        first.mkdir()
    else:
        first.write_bytes(
            {
                "empty": b"",
                "cut": sound[:-1],
                "longer": sound + b"\0",
                "zeros": bytes(len(sound)),
                "another page": second.read_bytes(),
            }[damage]
        )
    assert take(cached, 0, len(data)) == data


def test_bytes_that_arrived_broken_do_not_stay(remote_store, folder):
    run = opened(CachedObjects(remote_store, folder))
    key = next(key for key in remote_store.objects if key.endswith("t050/up1/c.0.0.0.0"))
    sound, version = remote_store.objects[key]
    remote_store.objects[key] = (bytes([sound[0] ^ 1]) + sound[1:], version)  # in transit: the version is the same
    with pytest.raises(CorruptError):
        run.numpy("up1", [0])
    assert page_files(folder) == []
    remote_store.objects[key] = (sound, version)
    run.numpy("up1", [0])


def test_a_shard_that_is_gone_is_said_to_be_gone(remote_store, folder):
    run = opened(CachedObjects(remote_store, folder))
    run.numpy("up1", [0])
    remote_store.objects.pop(next(key for key in remote_store.objects if key.endswith("t050/up1/c.0.0.0.0")))
    with pytest.raises(CorruptError, match="is gone"):
        run.numpy("up1", [0])


def test_only_shards_are_asked_for_their_version(remote_store, folder):
    class Lazy(RemoteSnapshot):
        version = property(lambda _: pytest.fail("a record needs no further request"), lambda *_: None)

    cached = CachedObjects(remote_store, folder)
    remote_store.open = lambda key: Lazy(remote_store, key)
    for key in ("zarr.json", "toy/samples/digest/c.0.0", "toy/r/t-0/t050/committed/up1/c.0"):
        remote_store.objects[key] = (b"data", "1")
        assert take(cached, 0, 4, key) == cached.get(key) == b"data"
    assert page_files(folder) == []


def test_a_page_that_arrived_broken_is_asked_for_again_at_once(remote_store, folder, lab):
    run = opened(CachedObjects(remote_store, folder))
    key = next(key for key in remote_store.objects if key.endswith("t050/up1/c.0.0.0.0"))
    sound, version = remote_store.objects[key]
    remote_store.objects[key] = (bytes([sound[0] ^ 1]) + sound[1:], version)
    run.numpy("up1", [1])  # Another image of the page is sound.
    remote_store.objects[key] = (sound, version)
    np.testing.assert_array_equal(run.numpy("up1", [0]), lab.maps_of(run, [0], "up1"))


def test_the_bound_holds_and_what_was_used_last_stays(folder, monkeypatch):
    monkeypatch.setattr(pages, "_KEPT_AT_EVICTION", 1.0)
    keys = [KEY.replace("c.0.", f"c.{i}.") for i in range(20)]
    remote = Remote({key: noise(60_000, seed=i) for i, key in enumerate(keys)})
    limit = 10 * 65536
    cached = CachedObjects(remote, folder, limit_bytes=limit)
    for key in keys:
        take(cached, 0, 10, keys[0])  # used all the time
        take(cached, 0, 10, key)
        assert on_disk(folder) <= limit
    assert on_disk(folder) > limit // 2
    assert remote.reads[keys[0]] == 60_000
    remote.reads.clear()
    take(cached, 0, 10, keys[0])
    take(cached, 0, 10, keys[-1])
    assert not remote.reads
    take(cached, 0, 10, keys[1])
    assert remote.reads[keys[1]] == 60_000


def test_a_bound_smaller_than_a_page_caches_nothing_and_reads_rightly(folder):
    remote = Remote({KEY: noise(200_000)})
    cached = CachedObjects(remote, folder, limit_bytes=100_000)
    assert take(cached, 7, 1000) == take(cached, 7, 1000) == noise(200_000)[7:1007]
    assert remote.reads[KEY] == 2000
    assert page_files(folder) == []


def test_what_a_killed_process_left_is_swept_and_counted(folder):
    cache = PageCache(folder, 1 << 20)
    unfinished = folder / "featstore-pages-1" / "unfinished"
    died = subprocess.run(
        [sys.executable, "-c", "from featstore.store import partial; print(partial.new_name())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (unfinished / died).write_bytes(noise(1000))
    PageCache(folder, 1 << 20)
    assert list(unfinished.iterdir()) == []
    # A count that is too high, as after a death between counting and writing, corrects itself.
    (folder / "featstore-pages-1" / "used").write_bytes((1 << 40).to_bytes(8, "little"))
    one = cache.identity("one")
    cache.store(one, 0, memoryview(b"x" * 100))
    assert cache.load(one, 0) == b"x" * 100
    assert int.from_bytes((folder / "featstore-pages-1" / "used").read_bytes(), "little") < 100_000


def test_other_files_in_the_folder_are_left_alone(folder):
    folder.mkdir()
    (folder / "thesis.tex").write_bytes(bytes(100_000))
    cached = CachedObjects(Remote({KEY: noise(50_000)}), folder, limit_bytes=60_000)
    take(cached, 0, 10)
    take(CachedObjects(Remote({KEY: noise(50_000)}, "s3://b"), folder, limit_bytes=60_000), 0, 10)
    assert (folder / "thesis.tex").stat().st_size == 100_000
    assert len(page_files(folder)) == 1


_READER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
from tests.store.test_cached import LENGTH, LIMIT, Remote, noise, take
from featstore.store.cached import CachedObjects

keys = [f"toy/m/t/t050/up1/c.{i}.0.0.0" for i in range(30)]
remote = Remote({key: noise(LENGTH, seed=i) for i, key in enumerate(keys)})
cached = CachedObjects(remote, Path(sys.argv[2]), limit_bytes=LIMIT)
print("ready", flush=True)
for i in np.random.default_rng(int(sys.argv[3])).integers(0, 30, int(sys.argv[4])).tolist():
    assert take(cached, 0, LENGTH, keys[i]) == noise(LENGTH, seed=i)
print(cached.use.hit_bytes)
"""
LENGTH, LIMIT = 50_000, 12 * 53248


def reader(folder, seed, rounds):
    words = [sys.executable, "-c", _READER, Path(__file__).parents[2], folder, seed, rounds]
    return subprocess.Popen([str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_cache(folder):
    processes = [reader(folder, seed, 400) for seed in range(3)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert all(int(out.split()[-1]) > 0 for out, _ in results)
    assert on_disk(folder) <= LIMIT


def test_killed_processes_leave_nothing_that_is_served_or_stays(folder):
    for seed in range(6):
        process = reader(folder, seed, 10**6)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.02 + 0.03 * seed)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = reader(folder, 99, 400)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert int(out.split()[-1]) > 0
    assert on_disk(folder) <= LIMIT
    assert not list((folder / "featstore-pages-1" / "unfinished").iterdir())


def test_processes_count_one_after_the_other(folder):
    cache = PageCache(folder, 1 << 20)
    cache.store(cache.identity("one"), 0, memoryview(b"x"))
    keeping = threading.Thread(target=cache.store, args=(cache.identity("two"), 0, memoryview(b"x")))
    with (folder / "featstore-pages-1/used").open() as counter:
        fcntl.flock(counter, fcntl.LOCK_EX)
        keeping.start()
        keeping.join(0.3)
        assert keeping.is_alive()
    keeping.join(20)
    assert cache.load(cache.identity("two"), 0) == b"x"


def test_threads_share_a_cache(folder):
    data = noise(6 * PAGE_BYTES)
    cached = CachedObjects(Remote({KEY: data}), folder, limit_bytes=3 << 20)
    failures = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(30):
            offset = int(rng.integers(0, len(data) - 1000))
            if take(cached, offset, 1000) != data[offset : offset + 1000]:
                failures.append(offset)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert on_disk(folder) <= 3 << 20


def test_a_full_disk_only_costs_speed(folder, caplog):
    data = noise(3 * PAGE_BYTES)
    remote = Remote({KEY: data})
    cached = CachedObjects(remote, folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        assert take(cached, 0, len(data)) == data
        remote.reads.clear()
        assert take(cached, 100, 50) == data[100:150]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert remote.reads[KEY] == 50  # no page is fetched that cannot be kept
    assert page_files(folder) == []
    assert "keeps nothing for now: File too large" in caplog.text
    assert not list((folder / "featstore-pages-1" / "unfinished").iterdir())


def test_a_disk_that_is_full_from_the_start_only_costs_speed(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    remote = Remote({KEY: noise(1000)})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        cached = CachedObjects(remote, folder)
        assert take(cached, 0, 1000) == noise(1000)
    # Space is there again, some time later.
    monkeypatch.setattr(pages, "_PAUSE_SECONDS", 0.0)
    cached.pages._paused_until = 0.0
    take(cached, 0, 1000)
    remote.reads.clear()
    assert take(cached, 0, 1000) == noise(1000)
    assert not remote.reads


def test_a_folder_that_cannot_be_is_a_bad_request(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot keep a cache") as raised:
        CachedObjects(Remote(), tmp_path / "file")
    assert raised.value.exit_code == 2
    with pytest.raises(BadRequestError, match="positive"):
        CachedObjects(Remote(), tmp_path / "cache", limit_bytes=0)


def test_it_travels_to_a_worker(folder):
    cached = pickle.loads(pickle.dumps(CachedObjects(LocalObjects(folder), folder, limit_bytes=12345)))
    assert cached.pages.limit_bytes == 12345
    assert cached.url == str(folder)


def test_a_local_store_is_read_as_it_is(lab, tmp_path, folder):
    lab.full(tmp_path / "s.zarr", n=4)
    run = fs.open(tmp_path / "s.zarr", cache=folder).dataset("toy").runs()[0]
    assert run.numpy("up1", [0]).shape[0] == 1
    assert not folder.exists()
    local = LocalObjects(tmp_path)
    assert through_cache(local, folder, 1) is local

"""Objects in a dictionary that answer like a remote store: several requests at once, each of them counted."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter

from featstore.errors import CorruptError, NotFoundError
from featstore.store.objects import INTERNAL, Objects, Snapshot, check_key


class FakeSnapshot(Snapshot):
    def __init__(self, objects, key, data):
        self._objects, self._key, self._data = objects, key, data
        self.size_bytes = len(data)

    def close(self):
        pass

    def read_into(self, offset, buffers):
        self._objects.ask("read", self._key)
        for buffer in buffers:
            part = self._data[offset : offset + buffer.nbytes]
            if len(part) < buffer.nbytes:
                raise CorruptError(f"{self._key!r} ends at byte {offset}, before what it should hold")
            buffer[:] = part
            offset += buffer.nbytes


class FakeRemote(Objects):
    parallel_reads = 8

    def __init__(self, url="fake://bucket/store"):
        super().__init__(url)
        self.content = {}
        self.requests = Counter()
        self._guard = threading.Lock()
        self._locks = {}

    def ask(self, kind, key):
        """Every request comes by here, before it is answered."""
        check_key(key)
        with self._guard:
            self.requests[kind] += 1

    def exists(self, key):
        self.ask("head", key)
        return key in self.content

    def size_bytes(self, key):
        self.ask("head", key)
        return len(self.content.get(key, b""))

    def open(self, key):
        self.ask("open", key)
        if key not in self.content:
            raise NotFoundError(f"there is no {key!r}")
        return FakeSnapshot(self, key, self.content[key])

    def names(self, folder):
        self.ask("list", folder or "x")
        prefix = folder + "/" if folder else ""
        found = {key[len(prefix) :].split("/")[0] for key in self.content if key.startswith(prefix)}
        return sorted(found - {INTERNAL})

    def put(self, key, *buffers, durable=True):
        self.ask("put", key)
        data = b"".join(bytes(buffer) for buffer in buffers)
        with self._guard:
            self.content[key] = data
        return len(data)

    def put_new(self, key, *buffers, durable=True):
        self.ask("put", key)
        with self._guard:
            if key in self.content:
                return False
            self.content[key] = b"".join(bytes(buffer) for buffer in buffers)
        return True

    def delete(self, key, *, durable=True):
        self.ask("delete", key)
        with self._guard:
            self.content.pop(key, None)

    @contextlib.contextmanager
    def lock(self, name):
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            yield

    def require_writable(self):
        pass

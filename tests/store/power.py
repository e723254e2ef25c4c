"""A disk that loses its power: what a writer does to it is recorded, and what a power cut may leave is brought back.

The model is the worst that POSIX allows. Of a file, what was written since its last fsync may be there, in part, as
zeros, or not at all. Of a folder, every change of a name since its last fsync may be there or not, each by itself;
only putting one file in the place of another is atomic.
"""

# ruff: noqa: PTH102, PTH105, PTH108, PTH119, PTH120

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from pathlib import Path

from featstore.store.objects import INTERNAL


class Recorder:
    """Stands in for ``os`` in `featstore.store.local`: does all but fsync, and notes what changes the disk."""

    def __init__(self):
        self.log = []
        self._open = {}
        self._numbers = itertools.count()

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags, *mode):
        new = flags & os.O_CREAT and not Path(path).exists()
        fd = os.open(path, flags, *mode)
        self._open[fd] = str(path)
        if new:
            self._open[fd] = next(self._numbers)
            self.log.append(("name", str(path), self._open[fd]))
        return fd

    def writev(self, fd, buffers):
        count = os.writev(fd, buffers)
        self.log.append(("write", self._open[fd], b"".join(bytes(buffer) for buffer in buffers)[:count]))
        return count

    def fsync(self, fd):
        self.log.append(("sync", self._open[fd]))

    def replace(self, source, target):
        os.replace(source, target)
        self.log.append(("replace", str(source), str(target)))

    def link(self, source, target):
        os.link(source, target)
        self.log.append(("link", str(source), str(target)))

    def unlink(self, path):
        os.unlink(path)
        self.log.append(("unlink", str(path)))

    def mkdir(self, path, *mode):
        os.mkdir(path, *mode)
        self.log.append(("name", str(path), str(path)))


class Disk:
    """What the recorded steps have done so far: an entry is a file's number, or the path of a folder."""

    def __init__(self, root):
        self.root = str(root)
        self._now = defaultdict(dict)
        self._synced = defaultdict(dict)
        self._pending = defaultdict(list)
        self._content = {}
        self._durable = {}

    def step(self, kind, *arguments):
        if kind == "write":
            number, data = arguments
            self._content[number] += data
        elif kind == "sync" and isinstance(arguments[0], int):
            self._durable[arguments[0]] = self._content[arguments[0]]
        elif kind == "sync":
            (folder,) = arguments
            self._synced[folder] = dict(self._now[folder])
            self._pending[folder] = []
        elif kind == "name":
            path, entry = arguments
            if isinstance(entry, int):
                self._content[entry] = self._durable[entry] = b""
            self._set(path, entry)
        elif kind == "unlink":
            self._set(arguments[0], None)
        else:
            source, target = arguments
            entry = self._now[os.path.dirname(source)][os.path.basename(source)]
            self._set(target, entry)
            if kind == "replace":
                self._set(source, None)

    def _set(self, path, entry):
        folder, name = os.path.split(path)
        if entry is None:
            self._now[folder].pop(name)
        else:
            self._now[folder][name] = entry
        self._pending[folder].append((name, entry))

    def outcomes(self, rng, randoms):
        """The trees ({path: bytes}) that a power cut at this moment may leave."""
        every = [(folder, index) for folder, pending in self._pending.items() for index in range(len(pending))]
        # Names of unfinished files, which nothing reads, are all there or none.
        changes = [change for change in every if not change[0].endswith(INTERNAL)]
        unfinished = set(every) - set(changes)
        for rest in ("lost", "part", "zeros"):
            yield self._tree(set(every), rest)
        yield self._tree(set(), "lost")
        for change in changes:
            yield self._tree(unfinished | {change}, "lost")
            yield self._tree(set(every) - {change}, "part")
        for _ in range(randoms):
            some = {change for change in changes if rng.random() < 0.5}
            yield self._tree(unfinished | some, rng.choice(["lost", "part", "zeros"]))

    def _tree(self, kept, rest):
        names = {folder: dict(entries) for folder, entries in self._synced.items()}
        for folder, pending in self._pending.items():
            there = names.setdefault(folder, {})
            for index, (name, entry) in enumerate(pending):
                if (folder, index) not in kept:
                    continue
                if entry is None:
                    there.pop(name, None)
                else:
                    there[name] = entry
        tree = {}

        def walk(folder):
            for name, entry in names.get(folder, {}).items():
                path = f"{folder}/{name}"
                if isinstance(entry, str):
                    walk(path)
                else:
                    tree[os.path.relpath(path, self.root)] = self._left(entry, rest)

        walk(self.root)
        return tree

    def _left(self, number, rest):
        durable, written = self._durable[number], self._content[number]
        if durable == written or rest == "lost":
            return durable
        return bytes(len(written)) if rest == "zeros" else written[: (len(durable) + len(written)) // 2]

"""A disk that is full, or fails, at each single step of a writer: a clear error, nothing lost, and the rest later."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import featstore.store as fs
from featstore.errors import StorageError
from featstore.store import leases, local
from featstore.store.objects import INTERNAL
from featstore.store.verify import verify
from tests.store.test_kill import check_truth, leftovers

STEPS = ("open", "writev", "fsync", "replace", "link", "mkdir")
"""What changes the disk, or may: a file that is opened for reading only does not count."""


class Failing:
    """Stands in for ``os`` in `featstore.store.local`: the n-th step fails, and all after it if ``lasting``."""

    def __init__(self, number, code, *, lasting):
        self._number, self._code, self._lasting = number, code, lasting
        self.count = 0

    def __getattr__(self, name):
        genuine = getattr(os, name)
        return self._counted(genuine) if name in STEPS else genuine

    def _counted(self, genuine):
        def call(*arguments, **options):
            if genuine is os.open and not arguments[1] & os.O_CREAT:
                return genuine(*arguments, **options)
            self.count += 1
            if self.count == self._number or (self._lasting and self.count > self._number > 0):
                raise OSError(self._code, os.strerror(self._code))
            if genuine is os.fsync:
                return None  # Nothing is asked of the real disk.
            return genuine(*arguments, **options)

        return call


def extract(url, lab):
    """A store is made and filled, then it grows while images have changed: all kinds of writes there are."""
    for n, changed in ((10, ()), (70, (3, 5))):
        store, run = lab.start(url, n, changed)
        lease = leases.acquire(run.dataset.objects, run.path, 0)
        assert isinstance(lease, leases.Lease)
        try:
            lab.fill(run, piece=32)
        finally:
            lease.release()
        store.finish([run])


def comparable(url, lab):
    return {name: data for name, data in lab.files(url).items() if not name.startswith(f"{INTERNAL}/leases")}


@pytest.mark.parametrize(
    ("code", "lasting", "words", "hint"),
    [
        (errno.ENOSPC, False, "No space left", "free space on that disk"),
        pytest.param(errno.ENOSPC, True, "No space left", "free space on that disk", marks=pytest.mark.full),
        pytest.param(errno.EDQUOT, True, "quota exceeded", "your quota on that disk", marks=pytest.mark.full),
        pytest.param(errno.EIO, False, "Input/output error", "featstore verify", marks=pytest.mark.full),
    ],
)
def test_it_fails_at_each_step(tmp_path, lab, monkeypatch, told, code, lasting, words, hint):
    counter = Failing(0, code, lasting=False)
    with monkeypatch.context() as patch:
        patch.setattr(local, "os", counter)
        extract(tmp_path / "want", lab)
    want, named = comparable(tmp_path / "want", lab), 0
    for number in range(1, counter.count + 1):
        url = tmp_path / f"s{number}"
        with monkeypatch.context() as patch:
            patch.setattr(local, "os", Failing(number, code, lasting=lasting))
            with pytest.raises(StorageError, match=words) as caught:
                extract(url, lab)
        assert hint in caught.value.hint
        assert leftovers(url) == []
        if (url / "toy" / "zarr.json").exists():
            named += check_truth(url, lab)
        with monkeypatch.context() as patch:
            patch.setattr(local, "os", Failing(0, code, lasting=False))
            extract(url, lab)
        assert comparable(url, lab) == want
        assert verify(fs.open(url)).ok
        shutil.rmtree(url)
    assert counter.count > 300
    told(
        f"{os.strerror(code)}{' from then on' if lasting else ''} at each of {counter.count} steps: as many clear "
        f"errors, {named} rows named by records, all true; every rerun ended with the same bytes"
    )


SCRIPT = """
import importlib.util, json, subprocess, sys
root, kib, lab_file = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", root], check=True)
spec = importlib.util.spec_from_file_location("lab", lab_file)
lab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lab)
lab.LAYERS["large"] = (32, 16, 16)
from featstore.errors import FeatstoreError
from tests.store.test_kill import check_truth
from tests.store.test_faults_full_disk import comparable, extract
url = root + "/s"
try:
    extract(url, lab)
    raise SystemExit("it fitted")
except FeatstoreError as error:
    said = {"kind": type(error).__name__, "message": str(error), "hint": error.hint}
said["named"] = check_truth(url, lab)
subprocess.run(["mount", "-o", "remount,size=64m", root], check=True)
extract(url, lab)
extract(root + "/want", lab)
said["same"] = comparable(url, lab) == comparable(root + "/want", lab)
print(json.dumps(said))
"""
"""In a name space of its own: a tiny file system, an extraction that does not fit, then room, and it once more."""


def may_mount(folder):
    words = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", folder]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kib", [700, 1000, 1700])
def test_a_real_file_system_runs_full(tmp_path, told, kib):
    """Where this machine lets us mount one; elsewhere the errors above stand for it, and the summary says so."""
    root = tmp_path / "disk"
    root.mkdir()
    if not may_mount(root):
        told("no file system can be mounted here: the errors that it would give were injected instead")
        return
    words = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", SCRIPT]
    here = Path(__file__).parent
    result = subprocess.run(
        [*words, root, str(kib), here / "worker.py"], cwd=here.parents[1], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["kind"] == "StorageError"
    assert "No space left on device" in said["message"]
    assert "free space" in said["hint"]
    assert said["named"] > 0
    assert said["same"]
    told(f"a file system of {kib} KiB ran full: {said['named']} rows were kept, and with room the same bytes came out")

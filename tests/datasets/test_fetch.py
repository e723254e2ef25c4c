"""Data sets fetched from a server on loopback: compared, unpacked, put in their places; killed anywhere, they go on."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featstore.datasets import DATASETS, lock_file, resolve
from featstore.datasets.archives import ARCHIVES, BY_HAND
from featstore.datasets.label_scarce import SPECS
from featstore.datasets.unpack import SUFFIXES
from featstore.errors import BadRequestError, BusyError, CorruptError, IncompatibleError, StorageError
from featstore.pipelines import fetch as fetching
from featstore.pipelines.fetch import fetch
from featstore.pipelines.fetch_plan import UNFINISHED, make_plan
from tests.datasets.file_server import Fault, serving

FOLDERS = sorted(spec.folder for spec in SPECS.values())


def packed(wrapper="", folders=FOLDERS, noise_bytes=0, seed=0):
    """A .tar.gz of label-scarce sets with two images each; as much noise as is asked for makes it longer."""
    rng = np.random.default_rng(seed)
    files = {}
    for folder in folders:
        for split in ("train", "test"):
            image, mask = io.BytesIO(), io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(image, "png")
            np.save(mask, rng.integers(0, 15, (8, 8), dtype=np.uint8))
            files |= {f"{folder}/real/{split}/0.png": image, f"{folder}/real/{split}/0.npy": mask}
    files["notes/noise.bin"] = io.BytesIO(rng.bytes(noise_bytes))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(wrapper + name)
            info.size = len(content.getvalue())
            tar.addfile(info, io.BytesIO(content.getvalue()))
    return out.getvalue()


@pytest.fixture
def files(monkeypatch):
    """The server, with the archive of the label-scarce sets."""
    with serving() as server:
        server.content = packed()
        archive = dataclasses.replace(
            ARCHIVES["horse21"],
            url=f"{server.url}/datasets.tar.gz",
            download_bytes=2 * 10**6,
            unpacked_bytes=10**5,
            unpacked_limit_bytes=10**7,
        )
        for name in SPECS:
            monkeypatch.setitem(ARCHIVES, name, archive)
        # Waits for all that others are writing; what is durable cannot be seen here.
        monkeypatch.setattr(fetching.os, "sync", lambda: None)
        yield server


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


class Told:
    """A progress that remembers."""

    def __init__(self):
        self.stages, self.notes = [], []

    def start(self, title, total, unit):
        self.stages.append([title, total, unit, 0])

    def advance(self, steps=1):
        self.stages[-1][-1] += steps

    def describe(self, title):
        pass

    def note(self, text):
        self.notes.append(text)

    def stop(self):
        pass


def got(root, name="horse21", progress=None):
    return fetch(make_plan(name, root), progress)


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_all_sets_of_an_archive_are_put_in_their_places(files, root):
    told = Told()
    report = got(root, progress=told)
    assert names(root) == sorted([*FOLDERS, lock_file.NAME])
    for name in SPECS:
        dataset = resolve(name, data_root=root)
        assert [sample.key for sample in dataset.samples] == ["train/0.png", "test/0.png"]
        assert dataset.mask("train/0.png").shape == (8, 8)
    assert (report.fetched, report.archive_bytes, report.received_bytes) == (True, *[len(files.content)] * 2)
    assert report.sha256 == hashlib.sha256(files.content).hexdigest()
    assert {folder.name for folder in report.folders} == set(FOLDERS)
    stages = [(title.split()[0], unit, total, done) for title, total, unit, done in told.stages]
    assert stages == [(stage, "bytes", *[len(files.content)] * 2) for stage in ("fetching", "checking", "unpacking")]
    (said,) = told.notes
    assert "datasets.tar.gz" in said
    assert "to fetch from 127.0.0.1" in said


def test_what_is_there_is_not_fetched_again(files, root):
    got(root)
    files.log.clear()
    for name in SPECS:
        report = got(root, name)
        assert (report.fetched, report.received_bytes, report.folders) == (False, 0, ())
    assert files.log == []
    assert UNFINISHED not in names(root)


def test_one_that_is_missing_comes_back_and_the_others_stay(files, root):
    got(root)
    shutil.rmtree(root / "cat_15")
    mine = root / "horse_21" / "real" / "train" / "mine.png"
    mine.write_bytes(b"mine")
    report = got(root, "cat15")
    assert report.folders == (root / "cat_15",)
    assert report.compared == "lock"
    assert mine.read_bytes() == b"mine"


def test_an_archive_that_is_wrapped_in_a_folder(files, root):
    files.content = packed(wrapper="datasets/")
    got(root)
    assert names(root) == sorted([*FOLDERS, lock_file.NAME])


def test_an_archive_without_the_folder_is_refused_and_not_trusted(files, root):
    files.content = packed(folders=["cat_15"])
    with pytest.raises(CorruptError, match="no folder 'horse_21'"):
        got(root)
    assert names(root) == []
    files.content = packed()
    got(root)


def test_plan_asks_nobody_and_writes_nothing(files, root):
    plan = make_plan("horse21", root)
    assert not plan.present
    assert plan.archive.url == f"{files.url}/datasets.tar.gz"
    assert plan.to_json()["archive"]["have_bytes"] == 0
    assert files.log == []
    assert not root.exists()


def test_the_first_download_is_trusted_and_others_are_refused(files, root):
    first = got(root)
    assert first.compared == "nothing"
    lock = root / lock_file.NAME
    written = json.loads(lock.read_text())
    url = f"{files.url}/datasets.tar.gz"
    assert written == {"format": 1, "archives": {url: {"bytes": len(files.content), "sha256": first.sha256}}}
    shutil.rmtree(root / "horse_21")
    files.content = packed(seed=1)
    for _ in range(2):
        with pytest.raises(CorruptError) as error:
            got(root)
        other = hashlib.sha256(files.content).hexdigest()
        for part in (first.sha256, other, f"{len(files.content):,} bytes", str(lock)):
            assert part in str(error.value)
        assert f"remove the entry of {url}" in error.value.hint
        assert not (root / "horse_21").exists()
        assert UNFINISHED not in names(root)
    lock.unlink()
    assert got(root).sha256 == other


def test_a_lock_from_elsewhere_holds_for_the_first_download(files, root):
    root.mkdir()
    lock_file.add(root, f"{files.url}/datasets.tar.gz", lock_file.Locked(bytes=3, sha256="0" * 64))
    with pytest.raises(CorruptError, match="0" * 64):
        got(root)


@pytest.mark.parametrize("algorithm", ["md5", "sha1", "sha256"])
def test_a_digest_that_is_known(files, root, monkeypatch, algorithm):
    known = hashlib.new(algorithm, files.content).hexdigest()
    archive = dataclasses.replace(ARCHIVES["horse21"], digest=f"{algorithm}:{known}")
    monkeypatch.setitem(ARCHIVES, "horse21", archive)
    sound, files.content = files.content, packed(seed=1)
    with pytest.raises(
        CorruptError, match=rf"{algorithm} {hashlib.new(algorithm, files.content).hexdigest()}.*{known}"
    ):
        got(root)
    assert names(root) == []
    files.content = sound
    assert got(root).compared == algorithm


def test_a_damaged_archive_is_neither_kept_nor_trusted(files, root):
    sound, files.content = files.content, files.content[:-20]
    with pytest.raises(CorruptError, match="damaged"):
        got(root)
    assert names(root) == []
    files.content = sound
    got(root)


def test_an_archive_that_means_harm_leaves_nothing(files, root, tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in ("horse_21/real/train/0.png", "../../outside"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
    files.content = out.getvalue()
    with pytest.raises(CorruptError, match="leads elsewhere"):
        got(root)
    assert names(root) == []
    assert names(tmp_path) == ["data"]


CHILD = """
import dataclasses, os, signal, sys
from pathlib import Path
from featstore.datasets.archives import ARCHIVES
from featstore.pipelines import fetch as fetching
from featstore.pipelines.fetch_plan import make_plan

url, root, death = sys.argv[1:]
for name in ARCHIVES["horse21"].folders:
    ARCHIVES[name] = dataclasses.replace(ARCHIVES[name], url=url, unpacked_bytes=10**5)

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if death == "unpacking":
    genuine = fetching.unpack
    def unpack(whole, folder, limits, advance):
        seen = []
        def count(steps):
            seen.append(steps)
            if len(seen) == 5:
                die()
        genuine(whole, folder, limits, count)
    fetching.unpack = unpack
if death == "unpacked":
    os.sync = die
if death == "locked":
    fetching._place = die
if death == "placing":
    genuine_rename = Path.rename
    def rename(self, target):
        genuine_rename(self, target)
        if Path(target).parent == Path(root):
            die()
    Path.rename = rename
fetching.fetch(make_plan("horse21", Path(root)))
"""


def child(files, root, death):
    command = [sys.executable, "-c", CHILD, f"{files.url}/datasets.tar.gz", str(root), death]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_killed_in_the_middle_of_a_download_only_the_rest_is_fetched(files, root):
    files.content = packed(noise_bytes=1_000_000)
    files.pause_bytes = 600_000
    process = child(files, root, "downloading")
    part = root / UNFINISHED / "datasets.tar.gz" / "datasets.tar.gz.part"
    assert files.paused.wait(60), process.stderr.read()
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size == 600_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert names(root) == [UNFINISHED]
    assert not make_plan("horse21", root).present
    assert make_plan("horse21", root).have_bytes == 600_000
    files.go.set()
    files.pause_bytes = None
    before = files.sent_bytes
    told = Told()
    report = got(root, progress=told)
    assert report.received_bytes == files.sent_bytes - before == len(files.content) - 600_000
    assert report.sha256 == hashlib.sha256(files.content).hexdigest()
    assert "0.6 MB are here already" in told.notes[0]
    assert names(root) == sorted([*FOLDERS, lock_file.NAME])


@pytest.mark.parametrize("death", ["unpacking", "unpacked", "locked", "placing"])
def test_killed_later_nothing_is_fetched_again(files, root, death):
    process = child(files, root, death)
    _, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, err
    assert not make_plan("horse21", root).present
    assert [name for name in names(root) if name in FOLDERS] == (["bedroom_28"] if death == "placing" else [])
    files.log.clear()
    report = got(root)
    assert files.log == []
    assert (report.fetched, report.received_bytes) == (True, 0)
    assert names(root) == sorted([*FOLDERS, lock_file.NAME])
    assert len(resolve("horse21", data_root=root).samples) == 2


def test_an_archive_that_was_put_there_by_hand_is_used(files, root):
    place = root / UNFINISHED / "datasets.tar.gz"
    place.mkdir(parents=True)
    (place / "datasets.tar.gz").write_bytes(files.content)
    assert got(root).received_bytes == 0
    assert files.log == []


def test_a_server_that_gives_up_leaves_what_has_arrived(files, root, monkeypatch):
    files.content = packed(noise_bytes=500_000)
    files.faults = [Fault(cut_bytes=300_000), Fault(status=403)]
    monkeypatch.setattr("featstore.datasets.download.time.sleep", lambda _: None)
    with pytest.raises(StorageError, match="403"):
        got(root)
    assert names(root) == [UNFINISHED]
    assert got(root).received_bytes == len(files.content) - 300_000


def test_a_small_disk_is_refused_before_anything_is_fetched(files, root, monkeypatch):
    usage = shutil.disk_usage(root.parent)

    def free(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))

    needed = len(files.content) + ARCHIVES["horse21"].unpacked_bytes
    free(needed - 1)
    with pytest.raises(StorageError, match=r"free and the files of datasets\.tar\.gz and itself take") as error:
        got(root)
    assert error.value.exit_code == 2
    assert "--data-root" in error.value.hint
    assert make_plan("horse21", root).have_bytes == 0
    free(needed)
    got(root)


def test_another_process_at_the_same_archive(files, root):
    place = root / UNFINISHED / "datasets.tar.gz"
    place.mkdir(parents=True)
    plan = make_plan("horse21", root)
    other = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match=r"another process is fetching datasets\.tar\.gz"):
            fetch(plan)
        assert files.log == []
    finally:
        os.close(other)
    fetch(plan)
    files.log.clear()
    assert not fetch(plan).fetched  # planned before it was there
    assert files.log == []


def test_something_else_in_its_place(files, root):
    (root / "horse_21").mkdir(parents=True)
    make_plan("horse21", root)  # an empty folder is nothing
    (root / "horse_21" / "mine.txt").write_text("mine")
    with pytest.raises(BadRequestError, match="is not the data set 'horse21'") as error:
        make_plan("horse21", root)
    assert "move it away" in error.value.hint


def test_a_data_root_that_cannot_be_written(files, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(StorageError, match="cannot put horse21 into"):
        got(tmp_path / "data")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"format": 1}', '{"format": 1, "archives": {"u": {"bytes": 1, "sha256": "x"}}}', "[" * 10**5],
)
def test_a_damaged_lock_file_is_said_before_anything_is_fetched(files, root, text):
    root.mkdir()
    (root / lock_file.NAME).write_text(text)
    with pytest.raises(CorruptError, match=r"datasets\.lock is damaged") as error:
        got(root)
    assert "delete it" in error.value.hint
    assert files.log == []


def test_a_lock_file_of_a_later_version(files, root):
    root.mkdir()
    (root / lock_file.NAME).write_text('{"format": 2, "archives": []}')
    with pytest.raises(IncompatibleError, match="format 2"):
        got(root)


def test_the_lock_file_keeps_what_it_has_and_is_sorted(tmp_path):
    for url in ("b", "c", "a"):
        lock_file.add(tmp_path, url, lock_file.Locked(bytes=1, sha256="0" * 64))
    lock_file.add(tmp_path, "b", lock_file.Locked(bytes=2, sha256="1" * 64))
    assert list(json.loads((tmp_path / lock_file.NAME).read_text())["archives"]) == ["a", "b", "c"]
    known = lock_file.load(tmp_path)
    assert known["b"] == lock_file.Locked(bytes=2, sha256="1" * 64)
    assert names(tmp_path) == [lock_file.NAME]


def test_unknown_names_give_the_nearest(root):
    with pytest.raises(BadRequestError, match="unknown data set 'hores21'") as error:
        make_plan("hores21", root)
    assert error.value.hint == "did you mean 'horse21'?"


@pytest.mark.parametrize("name", ["folder:photos", "folder:PATH", "hub:OWNER/NAME", "hub:someone/something"])
def test_names_with_nothing_to_fetch(root, name):
    with pytest.raises(BadRequestError, match=f"nothing to fetch for '{name}'"):
        make_plan(name, root)


def test_what_needs_no_files_is_there(root):
    plan = make_plan("toyhorse", root)
    assert plan.present
    assert not fetch(plan).fetched
    assert not root.exists()


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_what_a_person_has_to_get(root, name):
    with pytest.raises(BadRequestError, match="cannot be fetched") as error:
        make_plan(name, root)
    assert BY_HAND[name] in str(error.value)
    assert error.value.hint == DATASETS[name].how_to_get


def test_every_known_set_is_fetched_or_got_by_hand_or_needs_no_files():
    for name, entry in DATASETS.items():
        assert (entry.folder is None) + (name in ARCHIVES) + (name in BY_HAND) == 1, name
    assert set(ARCHIVES) | set(BY_HAND) <= set(DATASETS)


@pytest.mark.parametrize("name", sorted(ARCHIVES))
def test_the_table_of_archives_is_sound(name, tmp_path):
    archive, entry = ARCHIVES[name], DATASETS[name]
    assert archive.url.startswith(("https://", "http://"))
    assert archive.name.endswith(SUFFIXES)
    assert archive.url in entry.how_to_get  # who fetches by hand gets the same file
    assert archive.unpacked_bytes < archive.unpacked_limit_bytes
    # What is unpacked is what is looked for.
    probes = (entry.probe,) if isinstance(entry.probe, str) else entry.probe
    for probe in probes:
        if (Path(entry.folder) / probe).is_relative_to(archive.folders[name]):
            (tmp_path / entry.folder / probe).mkdir(parents=True)
    assert entry.present(tmp_path)
    if archive.digest:
        algorithm, _, digest = archive.digest.partition(":")
        assert len(digest) == 2 * hashlib.new(algorithm).digest_size

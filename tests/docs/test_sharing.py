"""The walkthrough of docs/sharing.md, each person in processes and folders of their own, against a real S3 server."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import featstore
from featstore.pipelines.extract import extract
from featstore.pipelines.plan import ExtractConfig
from featstore.store.verify import verify
from tests.docs.test_documents import ROOT, SHORTER, blocks
from tests.pipelines import killing
from tests.store.s3_server import Bucket

COMMANDS = [
    text.replace("\\\n", " ")
    for _, language, text in blocks(ROOT / "docs" / "sharing.md")
    if language == "sh" and "serve" not in text
]


class Person:
    """Somebody with a home, a working folder and, perhaps, weights."""

    def __init__(self, name: str, place: Path, weights: Path | None) -> None:
        self.folder = place / name
        self.folder.mkdir()
        nothing = self.folder / "no-weights"
        nothing.mkdir()
        self.environment = os.environ | {
            "HOME": str(self.folder),
            "XDG_CACHE_HOME": str(self.folder / ".cache"),
            "FEATSTORE_WEIGHTS": str(weights or nothing),
        }

    def start(self, command: str, *more: str) -> subprocess.Popen:
        _, *words = shlex.split(command)
        words += SHORTER.get(words[0], ())
        return subprocess.Popen(
            [sys.executable, "-m", "featstore.cli", *words, *more],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def does(self, command: str, *more: str) -> str:
        process = self.start(command, *more)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, f"{command}\n{err}"
        return out


def shards(bucket: Bucket) -> int:
    """Shards that have been put, or begun to be."""
    return sum(request.method in ("PUT", "POST") and "/c." in request.path for request in bucket.proxy.log)


def test_one_extracts_to_a_bucket_another_trains_from_it_and_a_third_resumes(
    lab_bucket, weights_root, tmp_path, monkeypatch
):
    ada_extracts, ben_looks, ben_trains, cleo_resumes, checks, asks, pulls, pushes, tells_apart = COMMANDS
    ada = Person("ada", tmp_path, weights_root)
    ben = Person("ben", tmp_path, None)
    cleo = Person("cleo", tmp_path, weights_root)

    done = json.loads(ada.does(ada_extracts, "--device", "cpu", "--json"))
    assert [run["computed"] for run in done["runs"]] == [100, 100]

    (listed,) = json.loads(ben.does(ben_looks, "--json"))["datasets"]
    assert [(run["technique"], run["committed"], run["images"]) for run in listed["runs"]] == [
        ("basic", 100, 160),
        ("prompt", 100, 160),
    ]
    head = json.loads(ben.does(ben_trains, "--device", "cpu", "--json"))
    assert 0 <= head["metrics"]["miou"]["mean"] <= 1
    assert any(path.is_file() for path in (ben.folder / "cache").rglob("*"))

    # Cleo's machine dies once a block of hers has arrived and before the last one has.
    before = shards(lab_bucket)
    process = cleo.start(cleo_resumes, "--device", "cpu")
    deadline = time.monotonic() + 300
    while shards(lab_bucket) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = json.loads(cleo.does(cleo_resumes, "--device", "cpu", "--json"))
    for run in resumed["runs"]:
        assert run["computed"] + run["reused"] == 160
        assert run["reused"] >= 100
        assert run["failed"] == []
    again = json.loads(cleo.does(cleo_resumes, "--device", "cpu", "--json"))
    assert [run["computed"] for run in again["runs"]] == [0, 0]
    assert json.loads(cleo.does(checks, "--json"))["ok"]
    # Newest first: the one with nothing to do, the resumed one, the killed one, Ada's.
    logs = json.loads(ben.does(asks, "--json"))["logs"]
    assert [one["state"] for one in logs] == ["done", "done", "killed", "done"]

    ben.does(pulls)
    ben.does(pushes)
    assert "prompt" in ben.does(tells_apart)
    pulled = ben.folder / "laptop.zarr"
    assert verify(featstore.open(str(pulled))).ok
    # What three people made in a bucket, piece by piece, is what one makes at once on a disk.
    monkeypatch.setenv("FEATSTORE_WEIGHTS", str(weights_root))
    alone = tmp_path / "alone.zarr"
    extract(ExtractConfig(dataset="toyhorse", techniques="basic,prompt", store=str(alone), device="cpu"))
    assert killing.arrays(pulled) == killing.arrays(alone)

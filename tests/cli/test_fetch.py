"""`featstore datasets fetch`: what it prints, its exit status, and that it stands beside `featstore datasets NAME`."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest

from featstore.datasets.archives import ARCHIVES
from featstore.pipelines import fetch as fetching
from tests.datasets.file_server import serving

BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


@pytest.fixture
def files(monkeypatch):
    """A server with a small CIFAR-10: two pictures a batch."""
    rng = np.random.default_rng(0)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name in BATCHES:
            batch = {"labels": [3, 5], "data": rng.integers(0, 256, (2, 3072), dtype=np.uint8)}
            content = pickle.dumps(batch)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with serving() as server:
        server.content = out.getvalue()
        archive = dataclasses.replace(
            ARCHIVES["cifar10"],
            url=f"{server.url}/cifar-10-python.tar.gz",
            digest=f"md5:{hashlib.md5(server.content).hexdigest()}",
            download_bytes=60_000,
            unpacked_bytes=60_000,
        )
        monkeypatch.setitem(ARCHIVES, "cifar10", archive)
        monkeypatch.setattr(fetching.os, "sync", lambda: None)
        yield server


def test_a_data_set_is_fetched_and_listed(run, run_json, files, tmp_path):
    root = tmp_path / "data"
    words = ("cifar10", "--data-root", root)
    listed = run_json("datasets", *words)["datasets"]["cifar10"]
    assert listed["present"] is False
    assert listed["archive"] == f"{files.url}/cifar-10-python.tar.gz"
    assert "`featstore datasets fetch cifar10`" in run("datasets", *words).stdout

    result = run("datasets", "fetch", *words)
    assert result.stdout == f"cifar10: {root / 'cifar-10-batches-py'}\n"
    assert "about 60.0 kB, about 60.0 kB unpacked" in result.stderr
    for stage in ("fetching", "checking", "unpacking"):
        assert f"{stage} cifar-10-python.tar.gz: " in result.stderr
    assert run_json("datasets", *words)["datasets"]["cifar10"]["present"] is True
    again = run("datasets", "fetch", *words)
    assert "cifar10 is there already" in again.stdout
    assert len(files.log) == 1


def test_json(run_json, files, tmp_path):
    words = ("datasets", "fetch", "cifar10", "--data-root", tmp_path / "data")
    plan = run_json(*words, "--dry-run")
    assert plan == {
        "dataset": "cifar10",
        "where": str(tmp_path / "data"),
        "present": False,
        "archive": {
            "url": f"{files.url}/cifar-10-python.tar.gz",
            "bytes": 60_000,
            "have_bytes": 0,
            "unpacked_bytes": 60_000,
            "digest": ARCHIVES["cifar10"].digest,
        },
    }
    assert files.log == []
    assert not (tmp_path / "data").exists()
    report = run_json(*words)
    size = len(files.content)
    assert report.pop("seconds") > 0
    assert report.pop("unpacked_bytes") > 6 * 2 * 3072
    assert report == {
        "dataset": "cifar10",
        "where": str(tmp_path / "data"),
        "fetched": True,
        "url": f"{files.url}/cifar-10-python.tar.gz",
        "archive_bytes": size,
        "received_bytes": size,
        "sha256": hashlib.sha256(files.content).hexdigest(),
        "compared": "md5",
        "folders": [str(tmp_path / "data" / "cifar-10-batches-py")],
    }
    assert run_json(*words)["fetched"] is False
    assert run_json(*words, "--dry-run")["present"] is True


def test_an_archive_without_a_known_digest_is_said_to_be_trusted(run, files, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHIVES, "cifar10", dataclasses.replace(ARCHIVES["cifar10"], digest=None))
    shown = run("datasets", "fetch", "cifar10", "--data-root", tmp_path / "data").stdout
    assert f"no digest of this archive is known: the one of this download is in {tmp_path}" in shown


def test_the_data_root_of_the_environment(run, files, tmp_path, monkeypatch):
    monkeypatch.setenv("FEATSTORE_DATA", str(tmp_path / "there"))
    run("datasets", "fetch", "cifar10")
    assert (tmp_path / "there" / "cifar-10-batches-py" / "test_batch").is_file()


def test_dry_run_for_people(run, tmp_path):
    shown = run("datasets", "fetch", "horse21", "--data-root", tmp_path, "--dry-run")
    assert "about 47.0 MB" in shown.stdout
    assert "bedroom28, ffhq34, cat15, celeba19, ade-bedroom30 come with it" in shown.stdout
    assert "toyhorse is there already: it needs no files" in run("datasets", "fetch", "toyhorse", "--dry-run").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("hores21",), "did you mean 'horse21'?"),
        (("cityscapes",), "after registration"),
        (("folder:photos",), "nothing to fetch"),
        ((), "Missing argument 'NAME'"),
        (("horse21", "cat15"), "unexpected extra argument"),
    ],
)
def test_bad_requests(refused, tmp_path, words, said):
    assert said in refused("datasets", "fetch", *words)


def test_a_changed_archive_fails_and_says_both_digests(refused, run, files, tmp_path):
    known = ARCHIVES["cifar10"].digest.removeprefix("md5:")
    files.content = files.content[:-1] + b"?"
    message = run("datasets", "fetch", "cifar10", "--data-root", tmp_path / "data", code=1).stderr
    assert known in message
    assert hashlib.md5(files.content).hexdigest() in message

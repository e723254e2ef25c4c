"""Copying to and from real servers: a bucket whose replies go wrong, and a store that is shared over HTTP."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import featstore.store as fs
from featstore.errors import BadRequestError, StorageError
from featstore.pipelines.serving import ServeConfig, share
from featstore.pipelines.transfer import TransferConfig, execute, make_plan

WIDE = {"up1": (64, 32, 32), "attn-up-cross-2": (2, 8, 8)}
"""128 KiB and 256 B a map: shards of 8 MiB, and some that are read as a whole."""


def full(url, n, lab):
    opened, run = lab.start(url, n, layers=WIDE)
    for block in range(run.n_blocks):
        rows = list(run.block_rows(block))
        run.write_block(block, rows, {layer: lab.maps_of(run, rows, layer, WIDE) for layer in WIDE})
    opened.finish([run])
    return run


def copy(source, target, **options):
    config = TransferConfig(source=str(source), target=str(target), **options)
    return execute(config, make_plan(config))


def same(report):
    assert report.problems == []
    assert report.digests[0] == report.digests[1]
    return report


def test_to_a_bucket_and_back(tmp_path, lab, s3):
    run = full(tmp_path / "a", 100, lab)
    there = same(copy(tmp_path / "a", s3.url))
    assert (there.copied, there.skipped) == (4, 0)
    assert there.bytes == 100 * (2 * 64 * 32 * 32 + 2 * 2 * 8 * 8)
    back = same(copy(s3.url, tmp_path / "b"))
    assert back.digests == there.digests
    ours, theirs = lab.files(tmp_path / "a" / run.path), lab.files(tmp_path / "b" / run.path)
    assert ours == theirs
    again = same(copy(tmp_path / "a", s3.url))
    assert (again.copied, again.skipped, again.bytes) == (0, 4, 0)


def test_replies_that_go_wrong(tmp_path, lab, s3):
    full(tmp_path / "a", 70, lab)
    s3.proxy.fail(times=3, method="PUT", path="/up1/", status=500)
    s3.proxy.fail(times=1, method="PUT", path="/committed/", drop=True)
    s3.proxy.fail(times=1, method="PUT", path="/attn-up-cross-2/", status=503, pass_on=True)
    same(copy(tmp_path / "a", s3.url))
    s3.proxy.fail(times=2, method="GET", path="/up1/c.", cut_bytes=100_000)
    s3.proxy.fail(times=1, method="GET", path="/up1/c.1", status=500)
    same(copy(s3.url, tmp_path / "b"))


def test_a_whole_shard_takes_few_requests(tmp_path, lab, s3):
    full(tmp_path / "a", 64, lab)
    copy(tmp_path / "a", s3.url)
    s3.proxy.log.clear()
    copy(s3.url, tmp_path / "b", digests=False)
    asked = [one for one in s3.proxy.log if "/up1/c.0.0.0.0" in one.path]
    assert len(asked) <= 3


def test_a_bucket_that_stays_broken_is_an_error_and_the_rest_is_gone_on_with(tmp_path, lab, s3, monkeypatch):
    monkeypatch.setenv("FEATSTORE_REMOTE_RETRY_SECONDS", "0.2")
    full(tmp_path / "a", 130, lab)
    s3.proxy.fail(times=10_000, method="PUT", path="/committed/up1/c.1", status=500)
    with pytest.raises(StorageError):
        copy(tmp_path / "a", s3.url)
    s3.proxy.reset()
    run = fs.open(s3.url).dataset("toy").runs()[0]
    assert not run.committed("up1")[64:128].any()
    same(copy(tmp_path / "a", s3.url))
    assert fs.open(s3.url).dataset("toy").runs()[0].valid(list(WIDE)).all()


@pytest.fixture
def served(tmp_path, lab):
    """A store of 70 images behind a server, that cannot be listed and not be written."""
    full(tmp_path / "a", 70, lab)
    sharing = share(ServeConfig(store=str(tmp_path / "a"), port=0))
    thread = threading.Thread(target=sharing.run)
    thread.start()
    yield sharing.url
    sharing.stop()
    thread.join(20)
    assert not thread.is_alive()


def test_from_a_server_that_cannot_be_listed(tmp_path, lab, served):
    report = same(copy(served, tmp_path / "b"))
    assert report.copied == 4
    run = fs.open(tmp_path / "b").dataset("toy").runs()[0]
    floats = run.numpy("up1", [0, 69])
    np.testing.assert_array_equal(floats, lab.maps_of(run, [0, 69], "up1", WIDE))
    assert copy(served, tmp_path / "b").copied == 0


def test_nothing_is_put_where_nothing_can_be(tmp_path, lab, served):
    with pytest.raises(BadRequestError, match="nothing can be put at"):
        copy(tmp_path / "a", served)
    with pytest.raises(BadRequestError, match="same store"):
        copy(tmp_path / "a", f"{tmp_path}/x/../a")

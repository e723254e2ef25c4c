"""From URLs to places."""

from __future__ import annotations

from pathlib import Path

import pytest

from featstore.errors import BadRequestError
from featstore.store.local import LocalObjects
from featstore.store.remote import RemoteObjects
from featstore.store.remote_config import RemoteConfig
from featstore.store.urls import SCHEMES, is_remote, objects_at


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("S3://bucket/a/b//", "s3://bucket/a/b"),
        ("s3a://bucket/a", "s3://bucket/a"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("azure://container/a", "az://container/a"),
        ("http://HOST:8080/a%20b/", "http://host:8080/a%20b"),
        ("https://host", "https://host"),
        ("memory://name/", "memory://name"),
    ],
)
def test_urls_are_written_in_one_way(url, normal):
    objects = objects_at(url)
    assert isinstance(objects, RemoteObjects)
    assert objects.url == normal
    assert (objects.read_only, objects.can_list) == ((True, False) if normal.startswith("http") else (False, True))
    assert is_remote(url)


@pytest.mark.parametrize("url", ["a", "a/b", "/a", "~/a", "file:///a", Path("a")])
def test_folders(url):
    assert isinstance(objects_at(url), LocalObjects)
    assert not is_remote(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket/x", "unknown store scheme 's4://'"),
        ("ftp://host/x", "unknown store scheme 'ftp://'"),
        ("gcs://bucket/x", "unknown store scheme 'gcs://'"),
        ("s3://", "names no place"),
        ("s3:///path", "names no place"),
        ("memory://", "names no place"),
        ("s3://bucket/a//b", "names no place"),
        ("s3://bucket/../b", "names no place"),
        ("http://host/%2e%2e/b", "names no place"),
        ("s3://a bucket/b", "spaces"),
        ("http://host/b?x=1", "query or fragment"),
        ("s3://bucket/b#x", "query or fragment"),
        ("http://ada:secret@host/b", "user or password"),
        ("abfs://container@account.dfs.core.windows.net/b", "unknown store scheme"),
        ("", "empty store URL"),
        ("s3:/bucket/b", "lost a slash"),
        (Path("s3://bucket/b"), "lost a slash"),
    ],
)
def test_urls_that_are_refused(url, message):
    with pytest.raises(BadRequestError, match=message) as caught:
        objects_at(url)
    assert "secret" not in f"{caught.value} {caught.value.hint}"


def test_an_unknown_scheme_gets_the_nearest_and_the_list():
    with pytest.raises(BadRequestError) as caught:
        objects_at("s4://bucket")
    assert caught.value.hint == "did you mean 's3://'?"
    for scheme in SCHEMES:
        assert f"{scheme}://" in str(caught.value)


def test_patience_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("FEATSTORE_REMOTE_RETRY_SECONDS", "7.5")
    monkeypatch.setenv("FEATSTORE_REMOTE_REQUESTS", "3")
    objects = objects_at("s3://bucket")
    assert objects.config == RemoteConfig(retry_seconds=7.5, requests=3)
    assert objects.parallel_reads == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TIMEOUT_SECONDS", "soon"),
        ("TIMEOUT_SECONDS", "0"),
        ("RETRY_SECONDS", "-1"),
        ("REQUESTS", "0"),
        ("REQUESTS", "x"),
    ],
)
def test_patience_that_makes_no_sense(monkeypatch, name, value):
    monkeypatch.setenv(f"FEATSTORE_REMOTE_{name}", value)
    with pytest.raises(BadRequestError, match=value):
        objects_at("s3://bucket")

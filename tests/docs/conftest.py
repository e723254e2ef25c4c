from __future__ import annotations

import urllib.request

import pytest

from tests.store.s3_server import S3, Bucket, clean_environment, s3_server

__all__ = ["lab_bucket", "s3_server"]


@pytest.fixture
def lab_bucket(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The empty bucket ``lab-features`` of the documents, and an environment that leads to it."""
    clean_environment(monkeypatch)
    # Many processes on few cores: nothing here is about what gives up soon.
    monkeypatch.setenv("FEATSTORE_REMOTE_TIMEOUT_SECONDS", "60")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.proxy.url)
    for path, method in (("moto-api/reset", "POST"), ("lab-features", "PUT")):
        request = urllib.request.Request(f"http://127.0.0.1:{s3_server.moto_port}/{path}", method=method)
        urllib.request.urlopen(request).close()
    s3_server.proxy.reset()
    return Bucket("lab-features", s3_server.proxy)

"""Google's and Azure's interfaces: the same store there."""

from __future__ import annotations

import json

import numpy as np
import pytest

import featstore.store as fs
from featstore.errors import CorruptError, NotFoundError, ReplacedError, StorageError
from featstore.store.remote import PART_BYTES
from featstore.store.urls import objects_at
from featstore.store.verify import verify
from tests.store.azure_server import ACCOUNT, KEY, Azure
from tests.store.s3_server import clean_environment


@pytest.fixture
def google(s3, monkeypatch):
    """URL of a store in a bucket of moto's, which the proxy makes look like Google's."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    account = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps({"gcs_base_url": s3.proxy.url, **account}))
    monkeypatch.setenv("GOOGLE_BASE_URL", s3.proxy.url)
    s3.proxy.google = True
    return f"gs://{s3.name}/team/store"


@pytest.fixture
def service(monkeypatch):
    clean_environment(monkeypatch)
    azure = Azure()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azure.url)
    yield azure
    azure.close()


@pytest.fixture(params=["google", "azure"])
def url(request):
    if request.param == "google":
        return request.getfixturevalue("google")
    return f"az://{request.getfixturevalue('service').container}/team/store"


def test_objects(url):
    objects = objects_at(url)
    data = np.random.default_rng(0).bytes(2 * PART_BYTES + 5)
    for key, value in (("k", b"hello"), ("big", data)):
        objects.put(key, value)
        assert objects.get(key) == value
        assert objects.size_bytes(key) == len(value)
    with objects.open("big") as snapshot:
        assert snapshot.read_tail(100) == data[-100:]
        assert snapshot.read(3, 1000) == data[3:1003]
    assert objects.put_new("new", b"1")
    assert not objects.put_new("new", b"2")
    assert objects.get("new") == b"1"
    objects.put("x/y", b"")
    assert objects.names("") == ["big", "k", "new", "x"]
    with objects.open("x/y") as snapshot, pytest.raises(CorruptError, match="truncated"):
        snapshot.read_tail(1)
    for _ in range(2):
        objects.delete("k")
    assert not objects.exists("k")
    with pytest.raises(NotFoundError):
        objects.get("k")


def test_a_snapshot_is_one_state(url):
    objects = objects_at(url)
    objects.put("k", b"a" * 100)
    with objects.open("k") as snapshot:
        snapshot.read_tail(1)
        objects.put("k", b"b" * 100)
        with pytest.raises(ReplacedError):
            snapshot.read(0, 1)


def test_a_whole_store(url, lab):
    lab.full(url, 100)
    run = fs.open(url).dataset("toy").runs()[0]
    for layer in run.layers:
        assert np.array_equal(run.numpy(layer, range(100)), lab.maps_of(run, range(100), layer))
    assert verify(fs.open(url)).ok


def test_a_container_that_is_not_there(service):
    with pytest.raises(StorageError, match="there is no bucket 'another'"):
        objects_at("az://another/x").get("k")


def test_azure_is_asked_for_the_length_first(service):
    objects = objects_at("az://container/x")
    objects.put("k", bytes(100))
    service.log.clear()
    objects.open("k").read_tail(10)
    assert [method for method, *_ in service.log] == ["HEAD", "GET"]


@pytest.mark.parametrize(
    ("url", "variable"),
    [("az://container/x", "AZURE_STORAGE_ACCOUNT_NAME"), ("gs://bucket/x", "GOOGLE_SERVICE_ACCOUNT")],
)
def test_no_credentials(url, variable, monkeypatch):
    clean_environment(monkeypatch)
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:1")
    with pytest.raises(StorageError, match=r"there are no credentials|Account") as caught:
        objects_at(url).get("k")
    assert variable in caught.value.hint

"""What cannot work says so at once, in one line, with what to do."""

from __future__ import annotations

import contextlib
import datetime
import select
import socket
import ssl
import threading
import time

import pytest

import featstore.store as fs
from featstore.errors import BadRequestError, NotFoundError, StorageError
from featstore.store import remote_connection
from featstore.store.remote_config import RemoteConfig
from featstore.store.urls import objects_at
from tests.store.s3_server import Proxy


@pytest.fixture(autouse=True)
def _at_once():
    """Whatever it is, nobody waits for it long."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < 20


def refused(ask, *said, error=StorageError):
    """The hint of the one-line error that ``ask`` ends in."""
    with pytest.raises(error) as caught:
        ask()
    message = str(caught.value)
    assert "\n" not in message
    assert "Debug source" not in message
    for words in said:
        assert words in message
    return caught.value.hint


def patient(s3):
    """With the patience of everyday."""
    return objects_at(s3.url).__class__(s3.url, RemoteConfig())


def test_no_credentials(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    hint = refused(lambda: patient(s3).get("k"), s3.url, "there are no credentials")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_SKIP_SIGNATURE"):
        assert name in hint
    refused(lambda: fs.create(s3.url), "there are no credentials")
    assert not s3.proxy.log


def test_no_credentials_where_nobody_answers_for_the_machine(s3, monkeypatch):
    """Outside of EC2 its metadata service is a hole."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with socket.create_server(("127.0.0.1", 0)) as hole:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{hole.getsockname()[1]}")
        refused(lambda: objects_at(s3.url).get("k"), "there are no credentials")


def test_half_of_the_credentials(s3, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "AWS_SECRET_ACCESS_KEY" in refused(lambda: patient(s3).get("k"), "there are no credentials")


def test_public_buckets(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    objects_at(s3.url).exists("k")
    assert "authorization" not in {name.lower() for name in s3.proxy.log[0].headers}


def write_profiles(monkeypatch, tmp_path, credentials, config=""):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, text in (("credentials", credentials), ("config", config)):
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))


PROFILES = """
[default]
aws_access_key_id = AKIADEFAULT
aws_secret_access_key = one%two

[lab]
aws_access_key_id = AKIALAB
aws_secret_access_key = three
aws_session_token = four
"""


@pytest.mark.parametrize(("profile", "key"), [(None, "AKIADEFAULT"), ("default", "AKIADEFAULT"), ("lab", "AKIALAB")])
def test_profiles(s3, monkeypatch, tmp_path, profile, key):
    write_profiles(
        monkeypatch, tmp_path, PROFILES, "[profile lab]\nregion = eu-west-3\n[default]\nregion = eu-west-1\n"
    )
    if profile:
        monkeypatch.setenv("AWS_PROFILE", profile)
    objects_at(s3.url).exists("k")
    headers = s3.proxy.log[0].headers
    assert f"Credential={key}/" in headers["authorization"]
    assert f"/eu-west-{3 if profile == 'lab' else 1}/s3/" in headers["authorization"]
    assert headers.get("x-amz-security-token") == ("four" if profile == "lab" else None)


def test_a_profile_may_name_the_server_and_the_environment_wins(s3, monkeypatch, tmp_path):
    write_profiles(monkeypatch, tmp_path, PROFILES, f"[default]\nendpoint_url = {s3.proxy.url}\nregion = eu-west-1\n")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    objects_at(s3.url).exists("k")
    assert "/us-west-2/s3/" in s3.proxy.log[0].headers["authorization"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url)
    objects_at(s3.url).exists("k")
    assert "Credential=test/" in s3.proxy.log[1].headers["authorization"]


def test_profiles_that_cannot_be_used(s3, monkeypatch, tmp_path):
    write_profiles(monkeypatch, tmp_path, PROFILES, "[profile sso]\nsso_session = x\n")
    monkeypatch.setenv("AWS_PROFILE", "lob")
    hint = refused(
        lambda: objects_at(s3.url).get("k"), "unknown AWS profile 'lob'", "default, lab", error=BadRequestError
    )
    assert "'lab'" in hint
    monkeypatch.setenv("AWS_PROFILE", "sso")
    hint = refused(lambda: objects_at(s3.url).get("k"), "AWS profile 'sso'")
    assert "aws configure export-credentials --profile sso" in hint
    (tmp_path / "config").write_text("what is this")
    refused(lambda: objects_at(s3.url).get("k"), str(tmp_path / "config"))


def test_a_bucket_that_is_not_there(s3):
    for ask in (
        lambda: fs.open("s3://nobodys-bucket/x"),
        lambda: fs.create("s3://nobodys-bucket/x"),
        lambda: objects_at("s3://nobodys-bucket/x").put("k", b"1"),
        lambda: objects_at("s3://nobodys-bucket/x").names(""),
        lambda: objects_at("s3://nobodys-bucket/x").get("k"),
    ):
        assert "create it" in refused(ask, "there is no bucket 'nobodys-bucket'")


def test_a_store_that_is_not_there(s3):
    assert "featstore extract" in refused(lambda: fs.open(s3.url), s3.url, "no store", error=NotFoundError)


def test_a_bucket_with_other_things_in_it(s3):
    objects_at(s3.url).put("photo.jpg", b"1")
    refused(lambda: fs.create(s3.url), "photo.jpg", error=BadRequestError)


@pytest.mark.parametrize("status", [401, 403])
def test_access_denied(s3, status):
    body = b"<Error><Code>AccessDenied</Code><Message>Access\x1b[31m Denied</Message></Error>"
    s3.proxy.fail(times=99, status=status, body=body)
    hint = refused(lambda: patient(s3).get("k"), "cannot read", str(status), "(AccessDenied: Access[31m Denied)")
    assert "s3:PutObject" in hint
    assert "AWS_SKIP_SIGNATURE" in hint
    refused(lambda: patient(s3).put("k", b"1"), "cannot write", str(status))
    refused(lambda: patient(s3).put_new("k", b"1"), "cannot write", str(status))
    refused(lambda: patient(s3).delete("k"), "cannot delete", str(status))
    refused(lambda: patient(s3).names(""), "cannot list", str(status))
    refused(lambda: patient(s3).exists("k"), "cannot read", str(status))
    assert len(s3.proxy.log) == 6  # Nobody asks again.


def test_a_clock_that_is_wrong(s3):
    s3.proxy.fail(status=403, body=b"<Error><Code>RequestTimeTooSkewed</Code></Error>")
    assert "clock" in refused(lambda: patient(s3).get("k"), "RequestTimeTooSkewed")


def test_another_region(s3):
    said = b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>expecting 'eu-west-3'</Message></Error>"
    s3.proxy.fail(status=400, body=said)
    assert refused(lambda: patient(s3).get("k"), "400") == "set AWS_REGION=eu-west-3"
    s3.proxy.fail(status=301)
    assert "AWS_REGION" in refused(lambda: patient(s3).get("k"), "another region")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def test_nobody_there(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    begin = time.monotonic()
    hint = refused(lambda: patient(s3).get("k"), "the connection was refused", "attempts")
    assert "AWS_ENDPOINT_URL" in hint
    assert time.monotonic() - begin < 8
    refused(lambda: fs.open(s3.url), "the connection was refused")


def test_a_hole_in_the_network(s3, monkeypatch):
    """Packets are lost on the way: a listener whose queue is full does the same."""
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        connected = True
        while connected:
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
            connected = bool(select.select([], [waiting], [], 1.0)[1])
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{full.getsockname()[1]}")
        refused(lambda: patient(s3).get("k"), "no connection can be made (1 attempts in 5 s)")


def test_a_host_that_is_not_known(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio.invalid:9000")
    assert "AWS_ENDPOINT_URL" in refused(lambda: patient(s3).get("k"), "is not known")


@pytest.mark.parametrize("value", ["127.0.0.1:9000", "ftp://host", "http://", "http://a b"])
def test_an_endpoint_that_is_no_url(s3, monkeypatch, value):
    monkeypatch.setenv("AWS_ENDPOINT_URL", value)
    hint = refused(lambda: objects_at(s3.url).get("k"), f"endpoint {value!r} is no URL", error=BadRequestError)
    assert "AWS_ENDPOINT_URL=https://" in hint


def test_a_server_that_restarts_is_waited_for(s3, monkeypatch):
    """One that has answered before is worth more patience than one that never has."""
    monkeypatch.setattr(remote_connection, "_UNREACHABLE_SECONDS", 0)
    first = Proxy(s3.proxy.upstream_port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", first.url)
    objects = objects_at(s3.url)
    objects.put("k", b"1")
    port = first.port
    first.close()
    again = []
    restart = threading.Timer(1.0, lambda: again.append(Proxy(s3.proxy.upstream_port, listen=port)))
    restart.start()
    try:
        assert objects.get("k") == b"1"
    finally:
        restart.join()
        again[0].close()


@pytest.fixture
def authority(tmp_path):
    """Files of an authority's certificate, of one for localhost that it signed, and of the key of that."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("authority", "localhost")]
    files = [tmp_path / name for name in ("authority.pem", "localhost.pem", "key.pem")]
    for number, file in enumerate(files[:2]):
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[number])
            .issuer_name(names[0])
            .public_key(keys[number].public_key())
            .serial_number(number + 1)
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=number == 0, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        )
        file.write_bytes(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    files[2].write_bytes(keys[1].private_bytes(pem, pkcs8, serialization.NoEncryption()))
    return files


def test_certificates(s3, monkeypatch, authority):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*authority[1:])
    proxy = Proxy(s3.proxy.upstream_port, tls=tls)
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://localhost:{proxy.port}")
        assert "AWS_CA_BUNDLE" in refused(lambda: patient(s3).get("k"), "certificate", "not trusted")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority[0]))
        objects = objects_at(s3.url)
        objects.put("k", b"1")
        assert objects.get("k") == b"1"
        monkeypatch.setenv("AWS_CA_BUNDLE", "/nonexistent.pem")
        assert "AWS_CA_BUNDLE" in refused(lambda: objects_at(s3.url).get("k"), "/nonexistent.pem")
    finally:
        proxy.close()

"""`--cache` and `--cache-bytes`."""

from __future__ import annotations

import pytest

from featstore.cli.options import DEFAULT_CACHE_BYTES, parse_bytes
from featstore.errors import BadRequestError
from featstore.store.cached import DEFAULT_BYTES


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("20GB", 20 * 10**9),
        ("20 gb", 20 * 10**9),
        ("20G", 20 * 10**9),
        ("1.5TB", 1_500_000_000_000),
        ("512MiB", 512 << 20),
        ("0.5KiB", 512),
        ("1000000B", 10**6),
        (" 3k ", 3000),
        ("9" * 400, int("9" * 400)),
    ],
)
def test_sizes_as_people_write_them(text, size_bytes):
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1", "GB", "1PB", "1e9", "1,5GB", "iB", "5iB", "nan", "1 GB GB"])
def test_what_is_no_size(text):
    with pytest.raises(BadRequestError, match="no size"):
        parse_bytes(text)


def test_the_default_is_the_same_everywhere():
    assert parse_bytes(DEFAULT_CACHE_BYTES) == DEFAULT_BYTES


def test_bad_requests_are_refused_before_anything_is_read(refused, features, labelled, tmp_path):
    words = ("train-head", "--dataset", f"folder:{labelled}", "--techniques", "basic", "--store", features)
    assert "'much' is no size" in refused(*words, "--cache", tmp_path / "cache", "--cache-bytes", "much")
    (tmp_path / "file").touch()
    words = (*words[:-1], "http://127.0.0.1:1")
    assert "cannot keep a cache" in refused(*words, "--cache", tmp_path / "file")

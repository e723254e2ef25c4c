"""crc32c by whatever is installed."""

from __future__ import annotations

import os
import subprocess
import sys

import crc32c as package
import pytest

from featstore.store import crc
from featstore.store.crc import crc32c_cached

LARGE = crc._LARGE_BYTES


@pytest.fixture(params=["awscrt", "crc32c"])
def routine(request, monkeypatch):
    """Both ways, whether or not awscrt is installed to be found."""
    if request.param == "crc32c":
        monkeypatch.setitem(sys.modules, "awscrt", None)
    crc.fastest.cache_clear()
    yield crc.fastest()
    crc.fastest.cache_clear()


def test_known_answers(routine):
    # RFC 3720, B.4; the check value of the CRC catalogue.
    for data, value in [(b"\0" * 32, 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (b"123456789", 0xE3069283), (b"", 0)]:
        assert crc32c_cached(data) == routine(data, 0) == value


@pytest.mark.parametrize("size", [1, 63, LARGE - 1, LARGE, LARGE + 1, 5 * LARGE + 7])
def test_both_agree_whole_and_in_pieces(routine, size):
    data = os.urandom(size)
    want = package.crc32c(data)
    assert crc32c_cached(data) == crc32c_cached(memoryview(data)) == crc32c_cached(memoryview(bytearray(data))) == want
    value = 0
    for start in range(0, size, LARGE + 3):
        value = crc32c_cached(memoryview(data)[start : start + LARGE + 3], value)
    assert value == want


def test_small_pieces_import_nothing():
    code = (
        "import sys; from featstore.store.crc import crc32c_cached; crc32c_cached(bytes(10_000));"
        "assert 'awscrt' not in sys.modules;"
        "crc32c_cached(bytes(100_000)); assert 'awscrt' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

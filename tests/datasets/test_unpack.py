"""Archives that mean harm, or are damaged, are refused; nothing of them ever lies outside the folder."""

from __future__ import annotations

import errno
import gzip
import io
import shutil
import stat
import struct
import tarfile
import zipfile

import pytest

from featstore.datasets import unpack as unpacking
from featstore.datasets.unpack import Limits, unpack
from featstore.errors import BadRequestError, CorruptError, StorageError

LIMITS = Limits(bytes=10**6, entries=50)
FILES = {"set/a.txt": b"a" * 1000, "set/deep/er/b.bin": bytes(range(256)) * 100, "set/empty": b""}


def member(name, content=b"", **changes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, io.BytesIO(content)


def tar_of(path, members):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as file:
        for info, content in members:
            file.addfile(info, content)
    return path


def zip_of(path, files, attributes=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (attributes or {}).get(name, 0) << 16
            file.writestr(info, content)
    return path


@pytest.fixture
def into(tmp_path):
    folder = tmp_path / "place" / "into"
    folder.mkdir(parents=True)
    return folder


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "zip"])
def test_a_sound_archive_comes_out_as_it_went_in(tmp_path, into, suffix):
    path = tmp_path / f"sound.{suffix}"
    if suffix == "zip":
        zip_of(path, {"set/": b"", **FILES})
    else:
        tar_of(path, [member("set", type=tarfile.DIRTYPE, mode=0o500), *(member(*one) for one in FILES.items())])
    steps = []
    assert unpack(path, into, LIMITS, steps.append) == sum(map(len, FILES.values()))
    assert content(into) == FILES
    assert sum(steps) == path.stat().st_size
    assert min(steps) >= 0


def test_modes_of_a_tar_are_made_harmless(tmp_path, into):
    unpack(tar_of(tmp_path / "a.tar", [member("run", b"#!", mode=0o6777)]), into, LIMITS)
    assert stat.S_IMODE((into / "run").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    "name",
    ["../out", "set/../../out", "/tmp/featstore-out", "..", "set\\..\\out", "C:out", "C:/out", "a" * 2000],
)
@pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
def test_names_that_lead_elsewhere(tmp_path, into, suffix, name):
    path = tmp_path / f"evil.{suffix}"
    if suffix == "zip":
        zip_of(path, {"set/good": b"good", name: b"evil"})
    else:
        tar_of(path, [member("set/good", b"good"), member(name, b"evil")])
    with pytest.raises(CorruptError, match=r"a name that leads elsewhere; it was not unpacked"):
        unpack(path, into, LIMITS)
    assert set(content(tmp_path)) <= {f"evil.{suffix}", "place/into/set/good"}


def test_a_name_that_ends_early_in_a_zip(tmp_path, into):
    path = zip_of(tmp_path / "evil.zip", {"good.txt?.py": b"evil"})
    path.write_bytes(path.read_bytes().replace(b"good.txt?", b"good.txt\0"))
    with pytest.raises(CorruptError, match="leads elsewhere"):
        unpack(path, into, LIMITS)
    assert content(into) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"type": tarfile.SYMTYPE, "linkname": "../../secret"},
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.SYMTYPE, "linkname": "good"},
        {"type": tarfile.LNKTYPE, "linkname": "good"},
        {"type": tarfile.LNKTYPE, "linkname": "../../secret"},
        {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3},
        {"type": tarfile.BLKTYPE, "devmajor": 8, "devminor": 0},
        {"type": tarfile.FIFOTYPE},
        {"type": tarfile.CONTTYPE + b"x"},
    ],
    ids=lambda changes: f"{changes['type']!r}-{changes.get('linkname', '')}",
)
def test_what_is_neither_file_nor_folder_in_a_tar(tmp_path, into, changes):
    (tmp_path / "secret").write_bytes(b"secret")
    changes["type"] = changes["type"][:1]
    path = tar_of(tmp_path / "evil.tar.gz", [member("good", b"good"), member("evil", **changes)])
    if changes["type"] == tarfile.CONTTYPE:
        unpack(path, into, LIMITS)  # an old name for a file
        assert content(into) == {"good": b"good", "evil": b""}
        return
    with pytest.raises(CorruptError, match="'evil', which is neither a file nor a folder"):
        unpack(path, into, LIMITS)
    assert content(into) == {"good": b"good"}
    assert not any(path.is_symlink() for path in into.rglob("*"))


def test_a_file_through_a_link_of_the_same_archive(tmp_path, into):
    (tmp_path / "outside").mkdir()
    link = member("set", type=tarfile.SYMTYPE, linkname=str(tmp_path / "outside"))
    path = tar_of(tmp_path / "evil.tar.gz", [link, member("set/out", b"evil")])
    with pytest.raises(CorruptError):
        unpack(path, into, LIMITS)
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_what_is_neither_file_nor_folder_in_a_zip(tmp_path, into, kind):
    path = zip_of(tmp_path / "evil.zip", {"good": b"good", "evil": b"/etc/passwd"}, {"evil": kind | 0o777})
    with pytest.raises(CorruptError, match="'evil', which is neither a file nor a folder"):
        unpack(path, into, LIMITS)
    assert content(into) == {}


@pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
def test_a_bomb_of_one_file(tmp_path, into, suffix):
    path = tmp_path / f"bomb.{suffix}"
    zeros = bytes(LIMITS.bytes + 1)
    if suffix == "zip":
        zip_of(path, {"zeros": zeros})
    else:
        tar_of(path, [member("zeros", zeros)])
    assert path.stat().st_size < 10_000
    with pytest.raises(CorruptError, match="unpacks to more than 1,000,000 bytes"):
        unpack(path, into, LIMITS)
    assert content(into) == {}


@pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
def test_a_bomb_of_many_files(tmp_path, into, suffix):
    path = tmp_path / f"bomb.{suffix}"
    names = [f"set/{index}" for index in range(LIMITS.entries + 1)]
    if suffix == "zip":
        zip_of(path, dict.fromkeys(names, b""))
    else:
        tar_of(path, [member(name) for name in names])
    with pytest.raises(CorruptError, match="more than 50 files and folders"):
        unpack(path, into, LIMITS)


def test_a_zip_that_says_less_than_it_holds(tmp_path, into):
    path = zip_of(tmp_path / "bomb.zip", {"zeros": bytes(500_000)})
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 500_000), struct.pack("<I", 10)))
    with pytest.raises(CorruptError, match="damaged"):
        unpack(path, into, LIMITS)
    assert all(len(data) <= 10 for data in content(into).values())


def test_a_bomb_in_a_header(tmp_path, into):
    """A name of 50 MB would be held in memory to be read."""
    path = tar_of(tmp_path / "bomb.tar.gz", [member("a" * 50_000_000, b"x")])
    assert path.stat().st_size < 200_000
    with pytest.raises(CorruptError, match="a header that is far too long"):
        unpack(path, into, LIMITS)


def test_a_bomb_behind_the_end(tmp_path, into):
    tar_of(tmp_path / "small.tar", [member("good", b"good")])
    path = tmp_path / "bomb.tar.gz"
    path.write_bytes(gzip.compress((tmp_path / "small.tar").read_bytes() + bytes(5_000_000)))
    with pytest.raises(CorruptError, match="unpacks to more than"):
        unpack(path, into, LIMITS)


def test_a_sparse_file(tmp_path, into):
    header = bytearray(tarfile.TarInfo("holes").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"%011o\0" % 10**6  # what it says it has when its holes are filled
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    path = tmp_path / "evil.tar"
    path.write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(CorruptError, match="'holes', which is neither"):
        unpack(path, into, LIMITS)


@pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
def test_a_file_twice(tmp_path, into, suffix, recwarn):
    path = tmp_path / f"evil.{suffix}"
    if suffix == "zip":
        zip_of(path, {"set/a": b"1", "set/b": b"2"})
        path.write_bytes(path.read_bytes().replace(b"set/b", b"set/a"))
    else:
        tar_of(path, [member("set/a", b"1"), member("./set/a", b"2")])
    with pytest.raises(CorruptError, match=r"set/a' twice"):
        unpack(path, into, LIMITS)


@pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
def test_an_archive_that_was_cut_off_or_changed_anywhere_is_damaged(tmp_path, into, suffix):
    path = tmp_path / f"sound.{suffix}"
    noise = bytes((index * 7919 >> 3) & 255 for index in range(3000))
    if suffix == "zip":
        zip_of(path, {"set/noise": noise})
    else:
        tar_of(path, [member("set/noise", noise)])
    sound = path.read_bytes()
    survived = 0
    for place in range(0, len(sound), max(1, len(sound) // 60)):
        for broken in (sound[:place], sound[:place] + bytes([sound[place] ^ 0x55]) + sound[place + 1 :]):
            path.write_bytes(broken)
            try:
                unpack(path, into, LIMITS)
            except CorruptError:
                pass
            else:
                # Times, attributes, comments: what is not content is not covered by a checksum.
                survived += 1
                assert list(content(into).values()) == [noise]
            shutil.rmtree(into)
            into.mkdir()
    assert survived < 30


def test_an_unreadable_header_in_the_middle_is_not_the_end(tmp_path, into):
    path = tar_of(tmp_path / "broken.tar", [member("a", b"1"), member("b", b"2"), member("c", b"3")])
    broken = bytearray(path.read_bytes())
    broken[1024:1034] = b"\xff" * 10
    path.write_bytes(broken)
    with pytest.raises(CorruptError, match="damaged"):
        unpack(path, into, LIMITS)


def test_an_encrypted_zip(tmp_path, into):
    path = zip_of(tmp_path / "a.zip", {"secret": b"secret"})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="'secret', which is encrypted"):
        unpack(path, into, LIMITS)


@pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
def test_something_else_under_that_name(tmp_path, into, suffix):
    path = tmp_path / f"page.{suffix}"
    for text in (b"<html>Not found</html>" * 40, b""):
        path.write_bytes(text)
        with pytest.raises(CorruptError, match=f"page.{suffix} is damaged"):
            unpack(path, into, LIMITS)


def test_another_kind_of_archive(tmp_path, into):
    with pytest.raises(BadRequestError, match=r"'a\.rar'.*\.zip, \.tar, \.tar\.gz, \.tgz"):
        unpack(tmp_path / "a.rar", into, LIMITS)


@pytest.mark.parametrize("suffix", ["tar.gz", "zip"])
def test_a_full_disk(tmp_path, into, suffix, monkeypatch):
    path = tmp_path / f"a.{suffix}"
    zip_of(path, FILES) if suffix == "zip" else tar_of(path, [member(*one) for one in FILES.items()])

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(unpacking.shutil, "copyfileobj", full)
    monkeypatch.setattr(tarfile, "copyfileobj", full)
    with pytest.raises(StorageError, match="No space left on device") as error:
        unpack(path, into, LIMITS)
    assert "make room" in error.value.hint

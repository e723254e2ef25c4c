"""Downloads that are cut off, refused, slow, changed under way, begun by others: whole in the end, or a clear error."""

from __future__ import annotations

import errno
import random

import pytest

from featstore.datasets import download as downloads
from featstore.datasets.download import Patience, download
from featstore.errors import CorruptError, NotFoundError, StorageError
from tests.datasets.file_server import Fault, refused_port, serving

CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(310_000)
QUICK = Patience(attempts=3, first_wait_seconds=0.001, longest_wait_seconds=0.01, timeout_seconds=5)


@pytest.fixture
def files():
    with serving() as server:
        server.content = CONTENT
        yield server


class Ear:
    def __init__(self):
        self.begins, self.notes, self.bytes = [], [], 0

    def begin(self, have_bytes, total_bytes):
        self.begins.append((have_bytes, total_bytes))

    def advance(self, steps):
        self.bytes += steps

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def get(files, tmp_path):
    """Fetches the server's file as ``file.bin``; returns (bytes received, what was heard)."""

    def run(url=None, limit_bytes=10**6, patience=QUICK):
        ear = Ear()
        received = download(url or f"{files.url}/file.bin", path, ear, limit_bytes=limit_bytes, patience=patience)
        assert ear.bytes == received
        return received, ear

    path = run.path = tmp_path / "file.bin"
    run.part = tmp_path / "file.bin.part"
    return run


def whole(get, content=CONTENT):
    return get.path.read_bytes() == content and [one.name for one in get.path.parent.iterdir()] == ["file.bin"]


def test_a_file_arrives_and_nothing_else_is_left(get, files):
    received, ear = get()
    assert received == len(CONTENT)
    assert whole(get)
    assert ear.begins == [(0, len(CONTENT))]
    assert ear.notes == []
    (request,) = files.log
    assert "Range" not in request.headers
    assert request.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("tags", [True, False], ids=["etag", "last-modified"])
def test_a_connection_that_breaks_is_continued_where_it_broke(get, files, tags):
    files.tags = tags
    files.faults = [Fault(cut_bytes=100_000), Fault(cut_bytes=100_000)]
    received, ear = get()
    assert whole(get)
    assert received == len(CONTENT) == files.sent_bytes
    assert [request.headers.get("Range") for request in files.log] == [None, "bytes=100000-", "bytes=200000-"]
    assert files.log[1].headers["If-Range"] == (files.tag if tags else files.last_modified)
    assert len(ear.begins) == 1  # one bar
    assert len(ear.notes) == 2


def test_a_later_call_goes_on_with_what_an_earlier_one_has_left(get, files):
    files.faults = [Fault(cut_bytes=120_000)] + [Fault(drop=True)] * 2
    with pytest.raises(StorageError, match="attempts without progress") as error:
        get(patience=Patience(attempts=2, first_wait_seconds=0.001))
    assert "120,000 bytes that have arrived stay" in error.value.hint
    assert not get.path.exists()
    assert get.part.stat().st_size == 120_000
    files.faults = []
    before = files.sent_bytes
    received, ear = get()
    assert whole(get)
    assert received == files.sent_bytes - before == 180_000
    assert ear.begins == [(120_000, 300_000)]


def leave_part(get, files, size=120_000):
    files.faults = [Fault(cut_bytes=size), Fault(status=403)]
    with pytest.raises(StorageError):
        get()
    assert get.part.stat().st_size == size
    files.log.clear()


def test_a_server_that_knows_no_ranges_sends_all_of_it(get, files):
    leave_part(get, files)
    files.ranges = False
    received, ear = get()
    assert whole(get)
    assert received == len(CONTENT)
    assert ["cannot go on" in note for note in ear.notes] == [True]


@pytest.mark.parametrize("tags", [True, False], ids=["etag", "last-modified"])
def test_a_file_that_has_changed_is_fetched_anew(get, files, tags):
    files.tags = tags
    leave_part(get, files)
    files.content, files.last_modified = OTHER, "Thu, 22 Oct 2015 07:28:00 GMT"
    received, ear = get()
    assert whole(get, OTHER)
    assert received == len(OTHER)
    assert ["has changed" in note for note in ear.notes] == [True]


@pytest.mark.parametrize("tags", [True, False], ids=["etag", "last-modified"])
@pytest.mark.parametrize("size", [len(CONTENT), len(OTHER)], ids=["as-long", "longer"])
def test_a_change_is_noticed_where_a_server_ignores_conditions(get, files, tags, size):
    files.tags = tags
    leave_part(get, files)
    files.content, files.last_modified = OTHER[:size], "Thu, 22 Oct 2015 07:28:00 GMT"
    files.conditions = False
    get()
    assert whole(get, OTHER[:size])


def test_a_server_that_sends_ranges_in_pieces_is_asked_for_each(get, files):
    leave_part(get, files)
    files.most_bytes = 70_000
    received, _ = get()
    assert whole(get)
    assert received == 180_000
    assert [one.headers["Range"] for one in files.log] == ["bytes=120000-", "bytes=190000-", "bytes=260000-"]


@pytest.mark.parametrize("said", ["bytes 0-299999/300000", "bytes */300000", "nonsense"])
def test_another_part_than_was_asked_for_is_not_taken(get, files, said):
    leave_part(get, files)
    files.faults = [Fault(status=206, headers={"Content-Range": said})]
    _, ear = get()
    assert whole(get)
    assert "another part" in ear.notes[0]


def test_a_change_under_way_is_noticed(get, files):
    files.faults = [Fault(cut_bytes=100_000)]
    ear = Ear()

    def note(text):
        ear.notes.append(text)
        files.content = OTHER

    ear.note = note
    download(f"{files.url}/file.bin", get.path, ear, limit_bytes=10**6, patience=QUICK)
    assert whole(get, OTHER)
    assert ear.begins == [(0, len(CONTENT)), (0, len(OTHER))]


def test_a_file_that_has_become_shorter_than_its_part_is_fetched_anew(get, files):
    leave_part(get, files)
    files.content, files.conditions = b"short", False
    get()
    assert whole(get, b"short")


def test_the_part_of_another_address_is_not_continued(get, files):
    leave_part(get, files)
    get(f"{files.url}/other.bin")
    assert whole(get)
    assert "Range" not in files.log[0].headers


def test_a_part_without_a_sound_note_is_not_continued(get, files):
    leave_part(get, files)
    get.part.with_name("file.bin.part.json").write_text("{")
    get()
    assert whole(get)
    assert "Range" not in files.log[0].headers


def test_a_weak_tag_is_no_ground_for_going_on(get, files, monkeypatch):
    monkeypatch.setattr(type(files), "tag", 'W/"weak"')
    leave_part(get, files)
    get()
    assert whole(get)
    assert "Range" not in files.log[0].headers


def test_a_part_that_is_whole_already_needs_no_request(get, files):
    leave_part(get, files)
    get.part.write_bytes(CONTENT)
    received, _ = get()
    assert received == 0
    assert whole(get)
    assert files.log == []


def test_a_length_that_is_not_told_is_no_obstacle(get, files):
    files.length = False
    files.faults = [Fault(cut_bytes=100_000)]
    _, ear = get()
    assert whole(get)
    assert ear.begins == [(0, None)]


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_a_server_in_trouble_is_asked_again(get, files, status):
    files.faults = [Fault(times=2, status=status)]
    _, ear = get()
    assert whole(get)
    assert [str(status) in note for note in ear.notes] == [True, True]


def test_a_server_that_says_when_to_come_back_is_left_alone_until_then(get, files, monkeypatch):
    waited = []
    monkeypatch.setattr(downloads.time, "sleep", waited.append)
    files.faults = [
        Fault(status=503, headers={"Retry-After": "7"}),
        Fault(status=503, headers={"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}),
        Fault(status=503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Fault(status=503, headers={"Retry-After": "soon"}),
    ]
    get(patience=Patience(first_wait_seconds=0.001, longest_wait_seconds=60))
    assert waited[:2] == [7.0, 60.0]
    assert all(wait < 0.1 for wait in waited[2:])


def test_waits_grow_and_stay_bounded(get, files, monkeypatch):
    waited = []
    monkeypatch.setattr(downloads.time, "sleep", waited.append)
    files.faults = [Fault(times=7, status=500)]
    get(patience=Patience(attempts=8, first_wait_seconds=1, longest_wait_seconds=20))
    for wait, least in zip(waited, (1, 2, 4, 8, 16, 20, 20), strict=True):
        assert least <= wait <= min(20, 1.5 * least)


def test_progress_gives_new_patience_and_its_absence_ends_it(get, files):
    files.faults = [Fault(cut_bytes=20_000) for _ in range(10)]  # each brings something: more than three are fine
    get()
    assert whole(get)
    get.path.unlink()
    # All of it is sent anew each time, and never more than before: no progress.
    files.ranges = False
    files.faults = [Fault(cut_bytes=20_000) for _ in range(10)]
    with pytest.raises(StorageError, match="3 attempts without progress"):
        get()
    assert len(files.faults) == 10 - 4


@pytest.mark.parametrize(
    ("status", "kind"), [(404, NotFoundError), (410, NotFoundError), (401, StorageError), (403, StorageError)]
)
def test_a_refusal_ends_it_at_once(get, files, status, kind):
    files.faults = [Fault(times=9, status=status)]
    with pytest.raises(kind, match=f"answered {status}") as error:
        get()
    assert len(files.log) == 1
    assert f"put it at {get.path}" in error.value.hint


def test_a_silent_server_is_given_up(get, files):
    files.faults = [Fault(stall=True)]
    _, ear = get(patience=Patience(first_wait_seconds=0.001, timeout_seconds=0.2))
    assert whole(get)
    assert "ReadTimeout" in ear.notes[0]


def test_nobody_there(get):
    with pytest.raises(StorageError, match=r"ConnectError.*3 attempts"):
        get(f"http://127.0.0.1:{refused_port()}/file.bin")


def test_redirects_are_followed_and_ranges_with_them(get, files):
    files.faults = [
        Fault(status=302, headers={"Location": "/elsewhere"}),
        Fault(cut_bytes=100_000),
        Fault(status=302, headers={"Location": "/elsewhere"}),
    ]
    get()
    assert whole(get)
    assert [(one.path, one.headers.get("Range")) for one in files.log] == [
        ("/file.bin", None),
        ("/elsewhere", None),
        ("/file.bin", "bytes=100000-"),
        ("/elsewhere", "bytes=100000-"),
    ]


@pytest.mark.parametrize(
    ("place", "said"), [("ftp://127.0.0.1/file.bin", "UnsupportedProtocol"), ("/file.bin", "TooManyRedirects")]
)
def test_redirects_that_lead_nowhere(get, files, place, said):
    files.faults = [Fault(times=99, status=302, headers={"Location": place})]
    with pytest.raises(StorageError, match=said):
        get()


def test_a_way_out_of_encryption_is_not_taken(get, files, monkeypatch):
    transport = downloads.httpx2.MockTransport(
        lambda request: (
            downloads.httpx2.Response(302, headers={"Location": f"{files.url}/file.bin"})
            if request.url.scheme == "https"
            else downloads.httpx2.Response(200, content=CONTENT)
        )
    )
    client = downloads.httpx2.Client
    monkeypatch.setattr(downloads.httpx2, "Client", lambda **options: client(transport=transport, **options))
    with pytest.raises(StorageError, match="not encrypted"):
        get("https://example.invalid/file.bin")
    assert not get.path.exists()


def test_a_file_that_is_far_too_long_is_refused(get, files):
    with pytest.raises(CorruptError, match="300,000 bytes, where 299,999 at most"):
        get(limit_bytes=299_999)
    files.length = False
    with pytest.raises(CorruptError, match="sends more, where 299,999 at most"):
        get(limit_bytes=299_999)
    assert list(get.path.parent.iterdir()) == []
    files.length = True
    get(limit_bytes=300_000)
    assert whole(get)


def test_a_listener_that_objects_ends_it_before_anything_is_fetched(get, files, tmp_path):
    class Objects(Ear):
        def begin(self, have_bytes, total_bytes):
            raise StorageError("too small a disk")

    with pytest.raises(StorageError, match="too small a disk"):
        download(f"{files.url}/file.bin", get.path, Objects(), limit_bytes=10**6, patience=QUICK)
    assert not get.path.exists()


def test_a_full_disk_is_said_and_what_has_arrived_stays(get, files, monkeypatch):
    genuine = downloads.Path.open

    def small(self, mode="r", **options):
        file = genuine(self, mode, **options)
        if mode != "ab":
            return file

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def write(self, data):
                if file.tell() + len(data) > 200_000:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return file.write(data)

        return Full()

    monkeypatch.setattr(downloads.Path, "open", small)
    with pytest.raises(StorageError, match="No space left") as error:
        get()
    assert "make room" in error.value.hint
    monkeypatch.undo()
    have = get.part.stat().st_size
    assert 0 < have <= 200_000
    received, _ = get()
    assert received == 300_000 - have
    assert whole(get)

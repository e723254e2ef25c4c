"""One file over HTTP, which goes on where an earlier attempt or an earlier process has left it.

Beside the partial file lies a note of what it is a part of: the URL, the length, and how the server named that state of
the file (``ETag``, ``Last-Modified``). The rest is asked for under the condition that it still is that state
(``If-Range``), and the answer is compared with the note for servers that know no conditions. Where they differ, or a
server knows no ranges, the file is begun anew.
"""

from __future__ import annotations

import dataclasses
import email.utils
import os
import random
import re
import ssl
import time
from importlib import metadata
from pathlib import Path
from typing import NoReturn, Protocol

import httpx2

from featstore.datasets.download_part import SUFFIX, Part, State
from featstore.errors import CorruptError, FeatstoreError, NotFoundError, StorageError
from featstore.whole_file import sync_folder

_LATER = (408, 425, 429)
"""Answers besides 5xx after which it is worth asking again."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to try. The defaults give a server about ten seconds to come back."""

    attempts: int = 5
    """In a row without a new byte, before it is given up."""
    first_wait_seconds: float = 0.5
    """Between two attempts; doubled with each, and up to half longer by chance."""
    longest_wait_seconds: float = 60.0
    """The most that is waited, also where the server asks for more."""
    timeout_seconds: float = 30.0
    """A connection on which nothing moves for as long is given up."""


class Listener(Protocol):
    """Hears how a download goes."""

    def begin(self, have_bytes: int, total_bytes: int | None) -> None:
        """The server has answered and nothing of its answer is read yet.

        Called again when a file is begun anew. What this raises ends the download.

        Args:
            have_bytes: what is here already.
            total_bytes: the whole length; None: the server does not say.
        """

    def advance(self, steps: int) -> None:
        """So many bytes more are in the partial file."""

    def note(self, text: str) -> None:
        """Something that a person should know: a failed attempt, a new beginning."""


class _LaterError(Exception):
    """This attempt has failed; another one may succeed."""

    def __init__(self, cause: str, wait_seconds: float = 0.0) -> None:
        super().__init__(cause)
        self.wait_seconds = wait_seconds


def download(url: str, path: Path, listener: Listener, *, limit_bytes: int, patience: Patience | None = None) -> int:
    """Fetch ``url`` as the file ``path``; an earlier attempt is continued. Redirects are followed.

    Only one process may be at the same ``path``.

    Args:
        url: http or https.
        path: what it becomes once it is whole; its folder must exist. Until then it is ``<path>.part``.
        listener: hears how it goes.
        limit_bytes: a longer file is refused.
        patience: how long to try.

    Returns:
        How many bytes were received.

    Raises:
        NotFoundError: if the server has no such file.
        CorruptError: if the file is longer than ``limit_bytes``.
        StorageError: if the server refuses or cannot be reached, or the disk fails. What has arrived stays.
    """
    patience = patience or Patience()
    try:
        part = Part(path.with_name(path.name + SUFFIX), url)
        received = 0 if part.whole else _Download(url, part, listener, limit_bytes, patience).run()
        with part.path.open("rb") as file:
            os.fsync(file.fileno())
        part.path.replace(path)
        part.discard()
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}",
            hint="make room, or name another disk with --data-root; what has arrived stays",
        ) from error
    return received


class _Download:
    """Attempts at one file."""

    def __init__(self, url: str, part: Part, listener: Listener, limit_bytes: int, patience: Patience) -> None:
        self._url, self._part, self._listener = url, part, listener
        self._limit_bytes, self._patience = limit_bytes, patience
        self._received = 0
        self._begun = False

    def run(self) -> int:
        """Try until the file is whole; returns how many bytes came."""
        timeout = httpx2.Timeout(self._patience.timeout_seconds)
        agent = f"featstore/{metadata.version('featstore')}"
        # The file's own bytes are wanted, not a server's packing of them.
        headers = {"User-Agent": agent, "Accept-Encoding": "identity"}
        most, failures = self._part.have_bytes, 0
        with httpx2.Client(follow_redirects=True, timeout=timeout, headers=headers) as client:
            while True:
                try:
                    self._attempt(client)
                    return self._received
                except _LaterError as error:
                    cause, wait_seconds = str(error), error.wait_seconds
                except httpx2.RequestError as error:
                    cause, wait_seconds = _reason(error), 0.0
                    if _hopeless(error):
                        self._fail(StorageError, cause)
                failures = 0 if self._part.have_bytes > most else failures + 1
                most = max(most, self._part.have_bytes)
                if failures >= self._patience.attempts:
                    self._fail(StorageError, f"{cause} ({failures} attempts without progress)")
                self._wait(cause, failures, wait_seconds)

    def _wait(self, cause: str, failures: int, asked_seconds: float) -> None:
        patience = self._patience
        seconds = patience.first_wait_seconds * 2 ** max(0, failures - 1) * random.uniform(1, 1.5)
        seconds = min(max(seconds, asked_seconds), patience.longest_wait_seconds)
        self._listener.note(f"{self._url}: {cause}; trying again in {seconds:.1f} s")
        time.sleep(seconds)

    def _attempt(self, client: httpx2.Client) -> None:
        """One request and all of its answer."""
        part = self._part
        headers = {}
        if part.have_bytes and part.state is not None and part.state.condition is not None:
            headers = {"Range": f"bytes={part.have_bytes}-", "If-Range": part.state.condition}
        with client.stream("GET", self._url, headers=headers) as response:
            if self._url.startswith("https:") and response.url.scheme != "https":
                self._fail(StorageError, f"the server leads to {response.url}, which is not encrypted")
            self._prepare(response, resumed=bool(headers))
            with part.path.open("ab", buffering=0) as file:
                for chunk in response.iter_raw():  # as it comes: what is gathered would be lost with the connection
                    if part.have_bytes + len(chunk) > self._limit_bytes:
                        part.discard()
                        self._too_long(None)
                    file.write(chunk)
                    part.have_bytes += len(chunk)
                    self._received += len(chunk)
                    self._listener.advance(len(chunk))
        total = part.state.total_bytes if part.state is not None else None
        if total is not None and part.have_bytes > total:
            part.discard()
            raise _LaterError("the server has sent more than it said")
        if total is not None and part.have_bytes < total:
            raise _LaterError("the answer was cut off")

    def _prepare(self, response: httpx2.Response, *, resumed: bool) -> None:
        """Read an answer's header; the partial file is then what its body continues."""
        part, status = self._part, response.status_code
        if status == 206 and resumed:
            state = self._state(response, _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "")))
            if part.state is None or part.state.differs(state):
                part.discard()
                raise _LaterError("the file has changed on the server, all of it is fetched anew")
        elif status == 200:
            state = self._state(response, None)
            if part.have_bytes:
                changed = part.state is not None and part.state.differs(state)
                why = "the file has changed on the server" if changed else "the server cannot go on where it was left"
                self._listener.note(f"{self._url}: {why}; all of it is fetched anew")
                self._begun = False
            part.start(state)
        elif status == 416 and resumed:
            part.discard()
            raise _LaterError("the server has no such part of the file, all of it is fetched anew")
        elif status in _LATER or status >= 500:
            raise _LaterError(f"the server answered {status} {response.reason_phrase}", _retry_after(response))
        elif status in (404, 410):
            self._fail(NotFoundError, f"the server answered {status} {response.reason_phrase}")
        else:
            self._fail(StorageError, f"the server answered {status} {response.reason_phrase}")
        total = part.state.total_bytes if part.state is not None else None
        if total is not None and total > self._limit_bytes:
            part.discard()
            self._too_long(total)
        if not self._begun:
            self._listener.begin(part.have_bytes, total)
            self._begun = True

    def _state(self, response: httpx2.Response, content_range: re.Match[str] | None) -> State:
        """What an answer says of the file; ``content_range``: where it is the rest of it."""
        headers = response.headers
        if response.status_code == 206:
            if content_range is None or int(content_range[1]) != self._part.have_bytes:
                self._part.discard()
                raise _LaterError(f"the server has sent another part ({headers.get('Content-Range', 'of none')})")
            total = None if content_range[3] == "*" else int(content_range[3])
        else:
            length = headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
        return State(
            url=self._url, etag=headers.get("ETag"), last_modified=headers.get("Last-Modified"), total_bytes=total
        )

    def _too_long(self, total_bytes: int | None) -> NoReturn:
        said = "sends more" if total_bytes is None else f"has {total_bytes:,} bytes"
        raise CorruptError(
            f"{self._url} {said}, where {self._limit_bytes:,} at most are expected",
            hint="nothing of it was kept; the address may lead to another file now",
        )

    def _fail(self, kind: type[FeatstoreError], cause: str) -> NoReturn:
        part = self._part
        kept = f"the {part.have_bytes:,} bytes that have arrived stay, and the same command goes on from there"
        path = part.path.with_name(part.path.name.removesuffix(SUFFIX))
        other = f"get the file in another way and put it at {path.absolute()}"
        raise kind(f"cannot fetch {self._url}: {cause}", hint=f"{kept}; or {other}" if part.have_bytes else other)


def _reason(error: httpx2.RequestError) -> str:
    """What went wrong, in a few words; messages of timeouts are often empty."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _hopeless(error: httpx2.RequestError) -> bool:
    """Whether the next attempt cannot end in another way."""
    if not isinstance(error, httpx2.TransportError):
        return True  # too many redirects, a body that cannot be decoded
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        return True
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _retry_after(response: httpx2.Response) -> float:
    """How long the server wants to be left alone: a number of seconds, or a time."""
    value = response.headers.get("Retry-After", "")
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0

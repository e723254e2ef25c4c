"""One state of a remote object, read by ranges of bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING

from obstore.exceptions import BaseError
from typing_extensions import override

from featstore.errors import CorruptError, ReplacedError
from featstore.store.objects import Extent, Snapshot
from featstore.store.remote_connection import Connection
from featstore.store.remote_errors import CutOffError, has_no_range

if TYPE_CHECKING:
    from obstore import Bytes, GetOptions, ObjectMeta, SuffixRange

GAP_BYTES = 256 << 10
"""Bytes between two stretches that are rather read along than asked for apart: about what passes in one round trip."""
REQUEST_BYTES = 8 << 20
"""Bytes that one request asks for at most: more of them at once, and less to repeat when one breaks."""


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """What tells one state of an object from another."""

    size_bytes: int
    e_tag: str | None
    modified: datetime

    @classmethod
    def of(cls, meta: ObjectMeta) -> State:
        """The state that an answer speaks of."""
        return cls(meta["size"], meta["e_tag"], meta["last_modified"])

    @property
    def version(self) -> str | None:
        """The ETag where it is strong: a weak one may stay when the bytes change, and fits no condition."""
        return self.e_tag if self.e_tag and not self.e_tag.startswith("W/") else None

    def same(self, other: State) -> bool:
        """Whether ``other`` is this state, as far as the server lets one know."""
        if self.version is not None and other.version is not None:
            return (self.version, self.size_bytes) == (other.version, other.size_bytes)
        return self == other


class RemoteSnapshot(Snapshot):
    """A remote object in the state that the first answer shows; nothing is asked before something is wanted.

    All later requests carry the first one's ETag as their condition, and their answers are compared with it,
    for servers that know no conditions.

    Args:
        connection: to the place.
        path: of the object in it.
        url: of the object, for messages.
    """

    def __init__(self, connection: Connection, path: str, url: str) -> None:
        self._connection = connection
        self._path = path
        self._url = url
        self._state: State | None = None

    @cached_property
    def size_bytes(self) -> int:  # type: ignore[override]
        """Length of the object."""
        return self._pinned().size_bytes

    @cached_property
    def version(self) -> str | None:  # type: ignore[override]
        """What tells this state from others."""
        return self._pinned().version

    @override
    def close(self) -> None:
        pass

    def _pinned(self) -> State:
        if self._state is None:
            meta = self._connection.run("read", self._url, lambda: self._connection.quick.head(self._path))
            self._state = State.of(meta)
        return self._state

    @override
    def read_tail(self, length: int) -> bytes:
        # Azure has no ranges that count from the end, so there the length has to be asked for first.
        if self._state is None and self._connection.scheme != "az" and length:
            body = bytes(self._get({"suffix": length}))
        else:
            size = self._pinned().size_bytes
            body = bytes(self._get((size - length, size))) if 0 < length <= size else b""
        if len(body) < length:
            raise CorruptError(f"it is truncated: {self.size_bytes} bytes, its end alone has {length}")
        return body

    @override
    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.read_many([(offset, buffers)])

    @override
    def read_many(self, extents: Sequence[Extent]) -> None:
        requests = list(_requests(extents))
        if requests and self._state is None:
            self._fill(requests.pop(0))  # Its answer says which state the others are to be of.
        count = min(len(requests), self._connection.config.requests)
        if count > 1:
            with ThreadPoolExecutor(count, thread_name_prefix="featstore-range") as pool:
                list(pool.map(self._fill, requests))
        else:
            for request in requests:
                self._fill(request)

    def _fill(self, request: _Request) -> None:
        if self._state is not None and request.end > self._state.size_bytes:
            raise self._too_short()
        body = memoryview(self._get((request.start, request.end)))
        if len(body) < request.end - request.start:
            raise self._too_short()
        for offset, target in request.parts:
            at = offset - request.start
            target[:] = body[at : at + target.nbytes]

    def _too_short(self) -> CorruptError:
        return CorruptError(f"{self._url!r} ends at byte {self.size_bytes}, before what it should hold")

    def _get(self, wanted: tuple[int, int] | SuffixRange) -> Bytes | bytes:
        """The range ``wanted``, checked to be of this state and whole; shorter only where the object ends."""
        pinned = self._state
        options: GetOptions = {"range": wanted}
        if pinned is not None and pinned.version is not None:
            options["if_match"] = pinned.version

        def request() -> tuple[State, Bytes | bytes]:
            client = self._connection.quick
            try:
                answer = client.get(self._path, options=options)
            except BaseError as error:
                # An object that is empty has no ranges, so servers answer with the whole of it.
                if not has_no_range(error) or (meta := client.head(self._path))["size"]:
                    raise
                return State.of(meta), b""
            state = State.of(answer.meta)
            if pinned is not None and not pinned.same(state):
                raise ReplacedError(f"{self._url!r} was replaced while it was read", hint="read it again")
            body = answer.bytes()
            size = state.size_bytes
            if isinstance(wanted, tuple):
                there = (wanted[0], min(wanted[1], size))
            else:
                there = (max(0, size - wanted["suffix"]), size)
            if answer.range != there or len(body) != there[1] - there[0]:
                raise CutOffError(f"{len(body)} of {there[1] - there[0]} bytes")
            return state, body

        state, body = self._connection.run("read", self._url, request)
        if pinned is None:
            self._state = state
        return body


@dataclasses.dataclass(slots=True)
class _Request:
    """Bytes of an object to ask for at once, and where they go."""

    start: int
    end: int
    parts: list[tuple[int, memoryview]]


def _requests(extents: Sequence[Extent]) -> Iterator[_Request]:
    """As few requests as fill the extents: near ones become one, long ones several."""
    parts: list[tuple[int, memoryview]] = []
    for offset, buffers in extents:
        for buffer in buffers:
            data = buffer.cast("B")
            for at in range(0, data.nbytes, REQUEST_BYTES):
                piece = data[at : at + REQUEST_BYTES]
                parts.append((offset + at, piece))
            offset += data.nbytes
    request: _Request | None = None
    for start, part in sorted(parts, key=lambda one: one[0]):
        end = start + part.nbytes
        if request is not None and start - request.end <= GAP_BYTES and end - request.start <= REQUEST_BYTES:
            request.parts.append((start, part))
            request.end = max(request.end, end)
            continue
        if request is not None:
            yield request
        request = _Request(start, end, [(start, part)])
    if request is not None:
        yield request

"""Objects in a bucket (S3, Google, Azure), on a web server, or in this process's memory, through obstore."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from obstore.exceptions import AlreadyExistsError, BaseError
from typing_extensions import override

from featstore.errors import CorruptError, NotFoundError, StorageError
from featstore.store.objects import INTERNAL, LOCKS, Objects, check_key, lock_number
from featstore.store.remote_config import RemoteConfig
from featstore.store.remote_connection import Connection, connection_to
from featstore.store.remote_errors import CONDITIONAL_HINT, CutOffError, Trouble
from featstore.store.remote_snapshot import RemoteSnapshot, State

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART_BYTES = 8 << 20
"""Objects beyond this length are uploaded in parts of it."""
PARTS_AT_ONCE = 4
_QUICK_BYTES = 1 << 20
"""Objects beyond this length may take longer to upload than a timeout lets a server be silent."""
_PROBE = f"{INTERNAL}/conditional-put"

_locks: dict[str, tuple[threading.Lock, ...]] = {}


class RemoteObjects(Objects):
    """Objects in a remote place.

    What is pickled is the URL and the configuration; credentials come from the environment on either side.
    An object is durable once its put has returned: that is what these places promise.

    Args:
        url: normalised, see `featstore.store.urls`.
        config: how patient requests are; None: as the environment says.

    Raises:
        BadRequestError: for a configuration in the environment that makes no sense.
    """

    def __init__(self, url: str, config: RemoteConfig | None = None) -> None:
        super().__init__(url)
        self.config = config or RemoteConfig.from_environment()
        self.scheme, _, rest = url.partition("://")
        web = self.scheme in ("http", "https")
        root, _, self._prefix = (url, "", "") if web else rest.partition("/")
        self._root = root
        self.read_only = web
        self.can_list = not web
        self.parallel_reads = 1 if self.scheme == "memory" else self.config.requests

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteObjects, (self.url, self.config)

    @cached_property
    def _connection(self) -> Connection:
        return connection_to(self.scheme, self._root, self.config)

    def _path(self, key: str) -> str:
        return f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)

    def _url(self, key: str) -> str:
        return f"{self.url}/{key}"

    @override
    def exists(self, key: str) -> bool:
        return self._head(key) is not None

    @override
    def size_bytes(self, key: str) -> int:
        state = self._head(key)
        return state.size_bytes if state is not None else 0

    def _head(self, key: str) -> State | None:
        """The object's state; None if there is none."""
        connection, path = self._connection, self._path(key)
        try:
            return State.of(connection.run("read", self._url(key), lambda: connection.quick.head(path)))
        except NotFoundError:
            return None

    @override
    def open(self, key: str) -> RemoteSnapshot:
        """The object ``key`` for positioned reads; that there is none is said by the first read."""
        return RemoteSnapshot(self._connection, self._path(key), self._url(key))

    @override
    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        connection, path = self._connection, self._path(key)

        def request() -> bytes:
            answer = connection.quick.get(path)
            size = answer.meta["size"]
            if max_bytes is not None and size > max_bytes:
                raise CorruptError(f"{key} has {size} bytes; at most {max_bytes} are sound")
            body = bytes(answer.bytes())
            if len(body) != size:
                raise CutOffError(f"{len(body)} of {size} bytes")
            return body

        return connection.run("read", self._url(key), request)

    @override
    def names(self, folder: str) -> list[str]:
        if not self.can_list:
            raise StorageError(
                f"cannot list {self.url!r}: a web server has no listing",
                hint="a store that is read over HTTP is found through its catalog.json, which extract and push write",
            )
        connection = self._connection
        path = self._path(folder) if folder else self._prefix
        found = connection.run("list", self._url(folder), lambda: connection.quick.list_with_delimiter(path))
        above = f"{path}/" if path else ""
        inside = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        # An object named like the folder itself is one of those that consoles make to show an empty folder.
        names = {one.removeprefix(above).strip("/") for one in inside if one.startswith(above)}
        return sorted(names - {"", INTERNAL})

    @override
    def put(self, key: str, *buffers: bytes | memoryview, durable: bool = True) -> int:
        self.require_writable()
        connection, path, body = self._connection, self._path(key), b"".join(buffers)
        # What becomes visible is the whole at the end; the parts of an upload that fails are deleted.
        large = len(body) > PART_BYTES
        client = connection.parts if large else self._client(body)
        connection.run(
            "write",
            self._url(key),
            lambda: client.put(path, body, use_multipart=large, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE),
        )
        return len(body)

    def _client(self, body: bytes) -> ObjectStore:
        return self._connection.slow if len(body) > _QUICK_BYTES else self._connection.quick

    @override
    def put_new(self, key: str, *buffers: bytes | memoryview, durable: bool = True) -> bool:
        """Like `put`, but only if there is no object ``key`` yet; False if there is.

        When an answer is lost nobody knows whether the object was put. So one that is found there by
        the next try and has exactly these bytes counts as ours: contents that must tell their makers
        apart, as those of leases do, carry something that nobody else's have.
        """
        self.require_writable()
        self._require_conditional_puts()
        return self._put_new(key, b"".join(buffers))

    def _put_new(self, key: str, body: bytes) -> bool:
        path, client, tries = self._path(key), self._client(body), 0

        def request() -> bool:
            nonlocal tries
            tries += 1
            try:
                client.put(path, body, mode="create", use_multipart=False)
            except AlreadyExistsError as error:
                if self._connection.diagnose(error).trouble is not Trouble.EXISTS:
                    raise
                return tries > 1 and self._holds(path, body)
            return True

        return self._connection.run("write", self._url(key), request)

    def _holds(self, path: str, body: bytes) -> bool:
        """Whether the object at ``path`` has the bytes ``body``; False too if it has gone since."""
        try:
            answer = self._connection.quick.get(path)
            return answer.meta["size"] == len(body) and bytes(answer.bytes()) == body
        except FileNotFoundError:
            return False

    def _require_conditional_puts(self) -> None:
        """Once a process: see that a create-only put is refused where there is an object.

        A server that does not know the condition would ignore it, and two writers would both be first.
        """
        connection = self._connection
        with connection.conditional_lock:
            if connection.conditional_puts:
                return
            connection.conditional_puts = not (self._put_new(_PROBE, b"1") and self._put_new(_PROBE, b"2"))
            if not connection.conditional_puts:
                with contextlib.suppress(BaseError, OSError):
                    connection.quick.delete(self._path(_PROBE))
                raise StorageError(f"the server of {self.url!r} has no create-only puts", hint=CONDITIONAL_HINT)

    @override
    def delete(self, key: str, *, durable: bool = True) -> None:
        self.require_writable()
        connection, path = self._connection, self._path(key)
        with contextlib.suppress(NotFoundError):
            connection.run("delete", self._url(key), lambda: connection.quick.delete(path))

    @override
    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold ``name`` among the threads of this process; across machines there are leases.

        Names share a few locks: two may wait for each other, which is correct, only slower.
        """
        locks = _locks.get(self.url) or _locks.setdefault(self.url, tuple(threading.Lock() for _ in range(2 * LOCKS)))
        with locks[lock_number(name)]:
            yield

    @override
    def require_writable(self) -> None:
        """Raise StorageError over HTTP. A bucket that refuses says so at the first put, which costs nothing extra."""
        if self.read_only:
            raise StorageError(
                f"{self.url!r} can only be read: a web server takes no objects",
                hint="write into the store where it lies, or into a bucket (s3://, gs://, az://)",
            )

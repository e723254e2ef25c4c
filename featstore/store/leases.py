"""Leases on blocks: who is computing what, so that several processes share one extraction.

A lease is an object that only one of many can create (`Objects.put_new`, which a disk and a bucket both give):
``.featstore/leases/<run>/<block>.<generation>``. It is never replaced. Its holder stays alive by creating the next
generation before the last one expires; whoever finds the last generation expired takes over by creating the next.
The last generation that there is says who holds the block; releasing deletes all of one's own.

Who has created one looks once more whether somebody else's is there and alive, and steps back if so. So of any number
of processes one at most holds a block, also where a listing and a deletion happen at the same moment: of two who have
both created a generation, the one who looks later sees the other's. (Both may, and step back: they come again.)

Holders that say the same ``job`` are attempts of one distributed extraction at the same work, of which its scheduler
lets one live: a later one does not wait for the lease of an earlier one, whose machine may be gone.

A lease saves work and is not needed for what is right: two holders of one block (a process that slept through its
time, a clock that is wrong) compute the same rows twice, and the store commits either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import json
import os
import random
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from featstore.errors import BusyError, CorruptError, FeatstoreError, NotFoundError
from featstore.store import partial
from featstore.store.objects import INTERNAL, OUTER, Objects

TTL_SECONDS = 120.0
"""Time after which a lease that is not renewed is over. Clocks of machines may differ by less than a third of it."""
_MAX_BYTES = 4096
_NAME = re.compile(r"(0|[1-9][0-9]{0,17})\.(0|[1-9][0-9]{0,17})")
_TRIES = 100
_RENEWALS = 10
_POLL_SECONDS = (0.02, 0.2)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lease, as it says itself."""

    block: int
    host: str
    pid: int
    user: str
    expires: float
    """Unix time in seconds."""
    job: str = ""
    """The distributed extraction that it works for; empty: none."""

    def __str__(self) -> str:
        """For messages: ``ada on host7 (process 4711)``."""
        return f"{self.user} on {self.host} (process {self.pid})"


class Lease:
    """A lease that this process holds; `release` ends it."""

    def __init__(
        self, objects: Objects, run: str, block: int, generation: int, *, nonce: str, expires: float, job: str = ""
    ) -> None:
        self._objects = objects
        self.run = run
        self.block = block
        self._generations = [generation]
        self._nonce = nonce
        self._expires = expires
        self._job = job
        self._lock = threading.Lock()
        self._over = False

    def renew(self) -> bool:
        """Hold it for another `TTL_SECONDS`; False if its time is over, and with it perhaps somebody else's now."""
        with self._lock:
            if self._over:
                return False
            if not self._put_next():
                self._over = True
                self._delete()
                return False
            self._generations.append(self._generations[-1] + 1)
            # The one before stays, so that a listing that goes on at this moment sees one of the two.
            self._delete(keep=2)
            return True

    def _put_next(self) -> bool:
        """Create the next generation; False if its time is over, or somebody else's is there and stays."""
        key = _key(self.run, self.block, self._generations[-1] + 1)
        for left in reversed(range(_RENEWALS)):
            now = time.time()
            # Whoever slept through its time must not come back beside those who have held the block since.
            if now >= self._expires:
                return False
            if self._objects.put_new(key, _statement(self._nonce, now + TTL_SECONDS, self._job), durable=False):
                self._expires = now + TTL_SECONDS
                return True
            # Perhaps of one who found an earlier holder's gone: that one looks again, sees this one, and steps back.
            if left:
                time.sleep(random.uniform(*_POLL_SECONDS))
        return False

    def release(self) -> None:
        """Give it back. What cannot be deleted now expires."""
        with self._lock:
            if not self._over:
                self._over = True
                self._delete()

    def _delete(self, keep: int = 0) -> None:
        """Delete one's own generations but for the last ``keep``, the last one last: it says who holds the block."""
        with contextlib.suppress(FeatstoreError):
            while len(self._generations) > keep:
                self._objects.delete(_key(self.run, self.block, self._generations[0]), durable=False)
                del self._generations[0]


def acquire(objects: Objects, run: str, block: int, job: str = "") -> Lease | Holder:
    """Take the lease on a block, or say who holds it.

    Args:
        objects: where the store lies.
        run: path of the run.
        block: number of the block.
        job: the distributed extraction that it is for; leases of its earlier attempts are not waited for.

    Raises:
        CorruptError: if what is there are no leases.
        StorageError: if the place of the store fails or refuses.
    """
    nonce = uuid.uuid4().hex
    for _ in range(_TRIES):
        there = _generations(objects, run).get(block, [])
        holder = _alive(objects, run, block, there[-1:], job)
        if holder is not None:
            return holder
        generation = there[-1] + 1 if there else 0
        expires = time.time() + TTL_SECONDS
        if not objects.put_new(_key(run, block, generation), _statement(nonce, expires, job), durable=False):
            continue
        lease = Lease(objects, run, block, generation, nonce=nonce, expires=expires, job=job)
        rival, others = _others(objects, run, block, generation, job)
        if rival is not None:
            lease.release()
            return rival
        # What others left to expire has no meaning any more.
        for one in others:
            with contextlib.suppress(FeatstoreError):
                objects.delete(_key(run, block, one), durable=False)
        return lease
    raise CorruptError(
        f"no lease on block {block} of {run} can be created",
        hint=f"delete {INTERNAL}/leases in the store while no extraction runs",
    )


def _alive(objects: Objects, run: str, block: int, generations: Sequence[int], job: str = "") -> Holder | None:
    """Who holds one of some generations of a block's lease, as long as it lives; the last one's, ``job``'s left out."""
    for generation in reversed(generations):
        found = _read(objects, _key(run, block, generation), block)
        if found is not None and found[1] and not (job and found[0].job == job):
            return found[0]
    return None


def _others(objects: Objects, run: str, block: int, own: int, job: str) -> tuple[Holder | None, list[int]]:
    """Who else holds a block's lease; if nobody, the generations of others, which are all over."""
    listed: list[int] = []
    while True:
        before, listed = listed, [one for one in _generations(objects, run).get(block, []) if one != own]
        # What is gone since it was listed says nothing: its holder may have renewed more than once meanwhile. Only
        # if all of it is still there was nobody alive. Who comes later sees one's own, and steps back.
        if set(before).issubset(listed) and (before or not listed):
            return None, before
        rival = _alive(objects, run, block, listed, job)
        if rival is not None:
            return rival, listed


def _generations(objects: Objects, run: str) -> dict[int, list[int]]:
    """Generations of the leases on blocks of a run, ascending, by block."""
    found: dict[int, list[int]] = {}
    for name in objects.names(_folder(run)):
        match = _NAME.fullmatch(name)
        if match is not None:
            found.setdefault(int(match[1]), []).append(int(match[2]))
    return {block: sorted(generations) for block, generations in found.items()}


def held(objects: Objects, run: str) -> list[Holder]:
    """Who holds leases on blocks of a run now, by block; for refusing to remove a run that is being written."""
    there = sorted(_generations(objects, run).items())
    holders = [_alive(objects, run, block, generations[-1:]) for block, generations in there]
    return [holder for holder in holders if holder is not None]


@contextlib.contextmanager
def exclusive(objects: Objects, name: str) -> Iterator[None]:
    """Hold ``name`` among all processes of all machines, for changes that take seconds; waits for whoever holds it.

    `Objects.lock`, which costs next to nothing, reaches no further than the threads of one process where the store
    lies in a bucket.

    Raises:
        BusyError: if somebody else holds it for longer than a lease lives.
        StorageError: if the place of the store fails or refuses.
    """
    patient_until = time.monotonic() + 1.5 * TTL_SECONDS
    with objects.lock(f"{OUTER}{name}"):
        while isinstance(lease := acquire(objects, name, 0), Holder):
            if time.monotonic() > patient_until:
                raise BusyError(f"{name} is being changed by {lease}", hint="wait until that has ended, and try again")
            time.sleep(random.uniform(*_POLL_SECONDS))
        try:
            yield
        finally:
            lease.release()


class Keeper:
    """Renews leases in a thread until they are released; a context manager, which releases what is left."""

    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="featstore-leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        with self._lock:
            left, self._leases = self._leases, set()
        for lease in left:
            lease.release()

    def keep(self, lease: Lease) -> None:
        """Renew ``lease`` from now on."""
        with self._lock:
            self._leases.add(lease)

    def release(self, lease: Lease) -> None:
        """Give ``lease`` back."""
        with self._lock:
            self._leases.discard(lease)
        lease.release()

    def _work(self) -> None:
        while not self._end.wait(TTL_SECONDS / 3):
            with self._lock:
                leases = list(self._leases)
            for lease in leases:
                try:
                    kept = lease.renew()
                except FeatstoreError:
                    continue  # A storage that fails is reported by what matters: the writes.
                if not kept:
                    with self._lock:
                        self._leases.discard(lease)


def _folder(run: str) -> str:
    return f"{INTERNAL}/leases/{run.replace('/', '~')}"


def _key(run: str, block: int, generation: int) -> str:
    return f"{_folder(run)}/{block}.{generation}"


def _statement(nonce: str, expires: float, job: str) -> bytes:
    pid = os.getpid()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no such user in a container
        user = "unknown"
    return json.dumps(
        {
            "nonce": nonce,
            "host": socket.gethostname(),
            "user": user,
            "pid": pid,
            "place": partial.place(),
            "started": partial.started(pid),
            "expires": expires,
            **({"job": job} if job else {}),
        }
    ).encode()


def _read(objects: Objects, key: str, block: int) -> tuple[Holder, bool] | None:
    """What a lease says, and whether it holds; None if it is gone or says nothing that makes sense."""
    try:
        value: Any = json.loads(objects.get(key, max_bytes=_MAX_BYTES))
        holder = Holder(
            block=block,
            host=str(value["host"])[:100],
            pid=int(value["pid"]),
            user=str(value["user"])[:100],
            expires=float(value["expires"]),
            job=str(value.get("job", ""))[:100],
        )
        place, started = value["place"], int(value["started"])
    except (NotFoundError, CorruptError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    now = time.time()
    # An hour that is wrong must not keep a block for an hour.
    alive = now < holder.expires < now + 2 * TTL_SECONDS
    if alive and place == partial.place():
        alive = partial.lives(holder.pid, started)
    return holder, alive

"""What `featstore.pipelines.cluster.window` has to do with Dask: tasks out, answers and news of workers in.

Everything that waits runs in the client's event loop and puts what it learns into one queue, so that whoever reads the
queue never blocks on a worker that is dying. For the same reason answers are not gathered as results of Dask's tasks,
which waits for a worker that has died with one: a worker sends them as an event, before Dask hears that the task is
done, over the same connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import pickle
import queue
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, Protocol

from featstore.errors import StorageError

if TYPE_CHECKING:
    from concurrent.futures import Future as Handle

    from distributed import Client, Future

LOOK_SECONDS = 1.0
"""Time between two looks at which workers there are."""
_DEAF_SECONDS = 120.0
"""How long a scheduler that is connected may take to say which workers there are."""
_LOST_SECONDS = 10.0
"""How long the answer of a task that has ended may still be under way."""
RESTART_SECONDS = 30.0
"""How long a worker may take to be killed before the scheduler just forgets it."""


class Keyed(Protocol):
    """What is sent: its key is what Dask's dashboard shows, its value what the function is called with."""

    @property
    def key(self) -> str:
        """Name of the task."""

    @property
    def value(self) -> Any:
        """Argument of the function."""


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """News of a task: it came to an end."""

    number: int
    result: Any = None
    error: BaseException | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Died:
    """News of a task: the worker it was on is gone, and Dask does not run it again."""

    number: int


@dataclasses.dataclass(frozen=True, slots=True)
class Present:
    """News of workers: threads of those that are there, by address, as of a time of `time.monotonic`."""

    threads: Mapping[str, int]
    asked: float


@dataclasses.dataclass(frozen=True, slots=True)
class Left:
    """News of a worker: it is gone, as it was meant to or not."""

    worker: str
    expected: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Deaf:
    """News of the scheduler: it does not answer."""


News = Ended | Died | Present | Left | Deaf


def _call(function: Callable[[Any], Any], task: Keyed, topic: str, number: int) -> None:
    """What runs on a worker. Errors travel like results: workers log none, and those that cannot be pickled arrive."""
    from distributed import get_worker

    try:
        answer = pickle.dumps(Ended(number, function(task.value)))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, the client decides
        answer = pickle.dumps(Ended(number, error=_portable(error)))
    get_worker().log_event(topic, answer)


def _portable(error: BaseException) -> BaseException:
    """``error`` if it survives the way to the client, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - pickling runs foreign code
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class Wire:
    """The connection to a cluster; a context manager that leaves nothing at the scheduler.

    Args:
        client: of the cluster; it stays open.
        function: what workers call with the value of each task.
    """

    def __init__(self, client: Client, function: Callable[[Any], Any]) -> None:
        self._client = client
        self._function = function
        self._news: queue.SimpleQueue[News] = queue.SimpleQueue()
        self._numbers = itertools.count()
        # Two clients of one scheduler may send tasks of the same name.
        self._token = uuid.uuid4().hex[:8]
        self._topic = f"featstore-{self._token}"
        self._sent: dict[int, Future] = {}
        self._heard: set[str] = set()
        self._looking: Handle[None] | None = None

    def __enter__(self) -> Wire:
        self._client.subscribe_topic(self._topic, self._answer)
        self._looking = asyncio.run_coroutine_threadsafe(self._look(), self._loop)
        return self

    def __exit__(self, *_: object) -> None:
        if self._looking is not None:
            self._looking.cancel()
        for number in list(self._sent):
            self.drop(number)
        for topic in [self._topic, *self._heard]:
            self._unsubscribe(topic)

    def news(self, timeout_seconds: float) -> News | None:
        """The next piece of news; None if there is none for so long."""
        try:
            return self._news.get(timeout=timeout_seconds)
        except queue.Empty:
            return None

    def send(self, task: Keyed, worker: str) -> int:
        """Have a task run on one worker; returns a number that news of it carry.

        Tasks of one worker begin in the order in which they were sent.
        """
        number = next(self._numbers)
        future = self._client.submit(
            _call,
            self._function,
            # Not its value: Dask walks through lists and dictionaries to look for futures in them.
            task,
            self._topic,
            number,
            key=f"{task.key}-{self._token}-{number}",
            workers=[worker],
            allow_other_workers=False,
            priority=-number,
            pure=False,
            retries=0,
        )
        self._sent[number] = future
        future.add_done_callback(functools.partial(self._ended, number))
        return number

    def drop(self, number: int) -> None:
        """Let go of a task: it has ended, or it is not to begin; news of it may still come."""
        future = self._sent.pop(number, None)
        if future is not None:
            future.release()

    def welcome(self, worker: str) -> None:
        """Listen to what becomes of a worker."""
        self._heard.add(worker)
        with contextlib.suppress(Exception):  # The look at all workers would tell, only later.
            self._client.subscribe_topic(worker, functools.partial(self._event, worker))

    def forget(self, worker: str) -> None:
        """The opposite."""
        if worker in self._heard:
            self._heard.discard(worker)
            self._unsubscribe(worker)

    def restart(self, worker: str) -> None:
        """Have a worker killed, whatever it does, and begun anew where it has a nanny; its leaving is news."""
        asyncio.run_coroutine_threadsafe(self._restart(worker), self._loop)

    def require_scheduler(self) -> None:
        """Raise `StorageError` if the connection to the scheduler is lost."""
        if self._client.status != "running":
            raise lost()

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop: asyncio.AbstractEventLoop = self._client.loop.asyncio_loop
        return loop

    def _unsubscribe(self, topic: str) -> None:
        with contextlib.suppress(Exception):  # The connection may be gone already.
            self._client.unsubscribe_topic(topic)

    def _answer(self, event: tuple[float, bytes]) -> None:
        """A worker has sent an answer; called in the loop."""
        answer: Ended = pickle.loads(event[1])
        self._news.put(answer)

    def _ended(self, number: int, future: Future) -> None:
        """Dask says that a task has ended, well or not; called in a thread of Dask's."""
        from distributed.scheduler import KilledWorker

        if number not in self._sent:
            return
        if future.status == "finished":
            # Its answer is there already, or on its way through the loop.
            error = RuntimeError("its result was lost")
            lost = Ended(number, error=error)
            self._loop.call_soon_threadsafe(lambda: self._loop.call_later(_LOST_SECONDS, self._news.put, lost))
        elif future.status == "error":
            error = future.exception()
            self._news.put(Died(number) if isinstance(error, KilledWorker) else Ended(number, error=error))
        else:
            self._news.put(Ended(number, error=CancelledError()))

    async def _look(self) -> None:
        while True:
            asked = time.monotonic()
            try:
                threads = await asyncio.wait_for(self._client.nthreads(), _DEAF_SECONDS)
            except TimeoutError:
                self._news.put(Deaf())
            except Exception:  # noqa: BLE001 - a lost scheduler shows in the client's status
                pass
            else:
                self._news.put(Present(dict(threads), asked))
            await asyncio.sleep(LOOK_SECONDS)

    def _event(self, worker: str, event: tuple[float, Any]) -> None:
        _, message = event
        if isinstance(message, dict) and message.get("action") == "remove-worker":
            self._news.put(Left(worker, bool(message.get("expected"))))

    async def _restart(self, worker: str) -> None:
        with contextlib.suppress(Exception):  # It is asked for again if the worker stays.
            await self._client.restart_workers([worker], timeout=RESTART_SECONDS, raise_for_error=False)


def lost() -> StorageError:
    """The error for a scheduler that is gone."""
    return StorageError(
        "the connection to the Dask scheduler is lost",
        hint="what was committed stays: the same command goes on from there once the scheduler is back",
    )


def deaf() -> StorageError:
    """The error for a scheduler that is connected and silent."""
    return StorageError(
        f"the Dask scheduler has not answered for {_DEAF_SECONDS:.0f} s",
        hint="what was committed stays: run the same command again when the scheduler answers",
    )

"""Many tasks through a Dask cluster, a bounded number at a time; knows nothing of features.

Each task is sent to one worker, and each worker has a few at a time: one for each thread and as many that wait, so
that no thread waits for the client. Leaving the choice of the worker to Dask would do as well for the speed, and was
given up for what happens when workers die. Dask runs a dead worker's tasks again by itself, several times and wherever
it likes; it cannot tell the task that kills its workers from those that happened to be there with it, and blames them
all. Here a task that was on a worker that died or hung is a *suspect*, and a suspect has a worker for itself the next
time: the poisoned one dies alone, and its neighbours end well.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from featstore.pipelines.cluster.wire import LOOK_SECONDS, RESTART_SECONDS, Deaf, Died, Ended, Left, Present, Wire, deaf

if TYPE_CHECKING:
    from distributed import Client

_DEAD = "its worker died"
_REASON_CHARACTERS = 300


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One piece of work."""

    key: str
    """Unique; what stands before its last parts is what Dask's dashboard calls it."""
    value: Any
    """Small and picklable."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Statistics:
    """What became of tasks."""

    done: int = 0
    failed: int = 0
    retried: int = 0
    """Times that one was tried again."""
    died: int = 0
    """Workers that were gone though nobody had asked them to go."""
    restarted: int = 0
    """Workers that hung."""
    most: int = 0
    """The largest number of tasks that were at the scheduler."""


def run_tasks(
    client: Client,
    function: Callable[[Any], Any],
    tasks: Iterable[Task],
    *,
    done: Callable[[Task, Any, str], None],
    failed: Callable[[Task, str], None],
    note: Callable[[str], None],
    tries: int = 3,
    ahead: int = 2,
    timeout_seconds: float | None = None,
    stop: threading.Event | None = None,
    fatal: tuple[type[Exception], ...] = (),
    barred: Collection[str] = (),
) -> Statistics:
    """Run ``function`` on the value of every task, on workers.

    Workers may join, leave and die at any time. Memory, here and at the scheduler, goes by the number of threads and
    not by the number of tasks.

    Args:
        client: of the cluster.
        function: what workers call; picklable, its results small.
        tasks: taken one by one as there is room for them.
        done: called in this thread with each task, its result and the address of its worker.
        failed: called in this thread with each task that failed ``tries`` times, and the last reason.
        note: takes lines for the user.
        tries: times that a task is tried; where there are others, not on a worker on which it has failed. A worker
            that leaves as it was asked to, or is restarted because of another task, is no failure of its tasks.
        ahead: tasks that are at the scheduler, for each thread of a worker.
        timeout_seconds: how long a task may take before its worker is restarted; None: for ever. A worker that has no
            nanny is not begun anew.
        stop: once set, nothing new begins, and this returns when what has begun has ended.
        fatal: exceptions of ``function`` that end everything.
        barred: addresses of workers that get nothing new; may change meanwhile.

    Raises:
        StorageError: if the scheduler is lost.
    """
    with Wire(client, function) as wire:
        window = _Window(wire, iter(tasks), tries=tries, ahead=ahead, timeout_seconds=timeout_seconds, barred=barred)
        window.done, window.failed, window.note, window.fatal = done, failed, note, fatal
        window.run(stop or threading.Event())
    return window.statistics


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class _Try:
    """A task on its way."""

    task: Task
    failures: int = 0
    avoid: set[str] = dataclasses.field(default_factory=set)
    """Workers on which it has failed."""
    suspect: bool = False
    """It was on a worker that died or hung."""
    began: float | None = None
    """When a thread was free for it; None: it waits for one."""


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class _Seat:
    """A worker and what it has to do, in the order in which it does it."""

    worker: str
    threads: int
    tries: dict[int, _Try] = dataclasses.field(default_factory=dict)
    late: set[int] = dataclasses.field(default_factory=set)
    """Those because of which it is being restarted; empty: it is not."""
    asked: float | None = None
    """When its restart was asked for."""
    reserved: bool = False
    """Whether it is for a suspect alone, as soon as it has nothing else to do."""

    def begin(self, now: float) -> None:
        """Tasks that a thread is free for have begun by now."""
        for one in itertools.islice(self.tries.values(), self.threads):
            if one.began is None:
                one.began = now


class _Window:
    """Seats, and tasks that wait to be tried again."""

    done: Callable[[Task, Any, str], None]
    failed: Callable[[Task, str], None]
    note: Callable[[str], None]
    fatal: tuple[type[Exception], ...]

    def __init__(
        self,
        wire: Wire,
        tasks: Iterable[Task],
        *,
        tries: int,
        ahead: int,
        timeout_seconds: float | None,
        barred: Collection[str],
    ) -> None:
        self.statistics = Statistics()
        self._wire = wire
        self._tasks = iter(tasks)
        self._more = True
        self._tries, self._ahead, self._timeout_seconds, self._barred = tries, ahead, timeout_seconds, barred
        self._seats: dict[str, _Seat] = {}
        self._places: dict[int, _Seat] = {}
        self._again: deque[_Try] = deque()
        self._left: dict[str, float] = {}
        self._alone = False

    def run(self, stop: threading.Event) -> None:
        """Run all tasks; see `run_tasks`."""
        stopped = False
        while True:
            if stop.is_set() and not stopped:
                stopped = True
                self._call_back()
            if not stopped:
                self._fill()
            if not self._places and (stopped or not (self._more or self._again)):
                return
            self._hear()
            self._wire.require_scheduler()
            if self._timeout_seconds is not None:
                self._restart_late(self._timeout_seconds)

    def _hear(self) -> None:
        """Act on all the news that there are, or wait a moment for some."""
        news = self._wire.news(LOOK_SECONDS)
        while news is not None:
            match news:
                case Ended():
                    self._ended(news)
                case Died(number) if (seat := self._places.get(number)) is not None:
                    self._gone(seat.worker, expected=False)
                case Left(worker, expected):
                    self._gone(worker, expected=expected)
                case Present(threads, asked):
                    self._meet(threads, asked)
                case Deaf():
                    raise deaf()
            news = self._wire.news(0)

    def _fill(self) -> None:
        """Give tasks to workers that have room, those with the fewest for each thread first."""
        seats = [seat for worker, seat in self._seats.items() if not seat.late and worker not in self._barred]
        self._reserve(seats)
        with_room = [seat for seat in seats if self._has_room(seat)]
        while with_room:
            seat = min(with_room, key=lambda one: len(one.tries) / one.threads)
            one = self._next(seat, {each.worker for each in seats})
            if one is None:
                with_room.remove(seat)
                continue
            number = self._wire.send(one.task, seat.worker)
            one.began = None
            seat.tries[number] = one
            seat.begin(time.monotonic())
            self._places[number] = seat
            if not self._has_room(seat):
                with_room.remove(seat)
        self.statistics.most = max(self.statistics.most, len(self._places))

    def _has_room(self, seat: _Seat) -> bool:
        return len(seat.tries) < (1 if seat.reserved else max(1, self._ahead * seat.threads))

    def _reserve(self, seats: Sequence[_Seat]) -> None:
        """Keep as many workers for suspects as there are suspects, but half of them at most."""
        wanted = sum(one.suspect for one in self._again)
        for seat in seats:
            running = any(one.suspect for one in seat.tries.values())
            seat.reserved = running or (seat.reserved and wanted > 0)
            wanted -= seat.reserved and not running
        reserved = sum(seat.reserved for seat in seats)
        others = sorted((seat for seat in seats if not seat.reserved), key=lambda one: len(one.tries))
        for seat in others[: max(0, min(wanted, max(1, len(seats) // 2) - reserved))]:
            seat.reserved = True

    def _next(self, seat: _Seat, workers: Collection[str]) -> _Try | None:
        """What a worker is to do next: what is tried again before what is new."""
        for one in self._again:
            elsewhere = seat.worker in one.avoid and not one.avoid.issuperset(workers)
            if one.suspect if seat.reserved else not (one.suspect or elsewhere):
                self._again.remove(one)
                return one
        task = next(self._tasks, None) if self._more and not seat.reserved else None
        if task is None:
            self._more = self._more and seat.reserved
            return None
        return _Try(task=task)

    def _take(self, number: int) -> tuple[_Try, _Seat] | None:
        """Take a task off its seat; None if it is not there any more."""
        seat = self._places.pop(number, None)
        if seat is None:
            return None
        one = seat.tries.pop(number)
        seat.late.discard(number)
        seat.begin(time.monotonic())
        return one, seat

    def _ended(self, news: Ended) -> None:
        taken = self._take(news.number)
        if taken is None:
            return
        self._wire.drop(news.number)
        one, seat = taken
        if news.error is None:
            self.statistics.done += 1
            self.done(one.task, news.result, seat.worker)
            return
        if isinstance(news.error, self.fatal):
            raise news.error
        if isinstance(news.error, CancelledError):
            self._wire.require_scheduler()
        one.avoid.add(seat.worker)
        self._retry(one, _reason(news.error))

    def _retry(self, one: _Try, reason: str) -> None:
        one.failures += 1
        if one.failures >= self._tries:
            self.statistics.failed += 1
            self.failed(one.task, reason)
            return
        self.statistics.retried += 1
        self._again.append(one)

    def _gone(self, worker: str, *, expected: bool) -> None:
        """A worker is not there any more: what it had to do is for others."""
        self._left[worker] = time.monotonic()
        self._wire.forget(worker)
        seat = self._seats.pop(worker, None)
        if seat is None:
            return
        late, restarted = set(seat.late), seat.asked is not None
        if not (expected or restarted):
            self.statistics.died += 1
            tasks = "its task goes" if len(seat.tries) == 1 else f"its {len(seat.tries)} tasks go"
            self.note(f"worker at {worker} has died; {tasks} to others")
        for number, one in list(seat.tries.items()):
            del self._places[number]
            self._wire.drop(number)
            # A worker that is frozen as a whole does not hand over how its tasks have ended: any may be to blame.
            one.suspect = one.suspect or restarted or not expected
            if number in late:
                self._retry(one, f"it took longer than {self._timeout_seconds:.0f} s")
            elif expected or restarted:
                self._again.append(one)
            else:
                self._retry(one, _DEAD)

    def _meet(self, threads: Mapping[str, int], asked: float) -> None:
        """Compare seats with the workers that are there."""
        for worker, count in threads.items():
            # What was asked for before a worker left still has it.
            if self._left.get(worker, 0.0) >= asked:
                continue
            if worker in self._seats:
                self._seats[worker].threads = count
            else:
                self._seats[worker] = _Seat(worker=worker, threads=max(1, count))
                self._wire.welcome(worker)
        for worker in set(self._seats).difference(threads):
            self._gone(worker, expected=False)
        self._left = {worker: when for worker, when in self._left.items() if when >= asked}
        if not self._seats and not self._alone:
            self.note("no worker is there; waiting for one")
        self._alone = not self._seats

    def _restart_late(self, timeout_seconds: float) -> None:
        now = time.monotonic()
        for seat in self._seats.values():
            late = {n for n, one in seat.tries.items() if one.began is not None and now - one.began > timeout_seconds}
            if not late or (seat.asked is not None and now - seat.asked < 2 * RESTART_SECONDS):
                continue
            if seat.asked is None:
                self.statistics.restarted += 1
                self.note(
                    f"worker at {seat.worker} has had a task for more than {timeout_seconds:.0f} s; it is restarted"
                )
            seat.late |= late
            seat.asked = now
            self._wire.restart(seat.worker)

    def _call_back(self) -> None:
        """Take back what no thread was free for yet."""
        for number, seat in list(self._places.items()):
            if seat.tries[number].began is None:
                self._take(number)
                self._wire.drop(number)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:_REASON_CHARACTERS]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

"""Several callers of one store, a request at a time, in every order there is, and with one of them dead anywhere."""

from __future__ import annotations

import contextlib
import itertools
import threading

from tests.store.fake_remote import FakeRemote


class Dead(BaseException):
    """What ends a caller that was killed: no handler of errors may catch it."""


class Stepped(FakeRemote):
    """Objects in a dictionary; a thread of a `Caller` waits for its turn before each request.

    Its lock holds nobody: so it is among machines.
    """

    parallel_reads = 1

    def __init__(self, content):
        super().__init__()
        self.content = dict(content)
        self.own = threading.local()

    def ask(self, kind, key):
        super().ask(kind, key)
        caller = getattr(self.own, "caller", None)
        if caller is not None and kind != "read":  # Opening an object is the request; what it holds is known then.
            caller.wait()

    @contextlib.contextmanager
    def lock(self, name):
        yield


class Caller:
    """A thread that makes a request whenever it is told to."""

    def __init__(self, objects, do):
        self._turn, self._ready = threading.Semaphore(0), threading.Semaphore(0)
        self._dying = False
        self.error = None
        self.over = False

        def run():
            objects.own.caller = self
            try:
                do()
            except Dead:
                pass
            except Exception as error:  # noqa: BLE001 - raised again where it is seen
                self.error = error
            self.over = True
            self._ready.release()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        self._ready.acquire()

    def wait(self):
        """Called by the thread before a request."""
        if self._dying:
            raise Dead
        self._ready.release()
        self._turn.acquire()
        if self._dying:
            raise Dead

    def step(self):
        """Let it make one request and come to its next one; nothing if it is done."""
        if not self.over:
            self._turn.release()
            self._ready.acquire()

    def finish(self):
        """Let it make all its requests; how many they were."""
        for count in itertools.count():
            if self.over:
                return count
            self.step()
        raise AssertionError

    def kill(self):
        """SIGKILL, before its next request."""
        self._dying = True
        self.step()


def steps_of(content, prepare):
    """How many requests a caller makes that is alone."""
    objects = Stepped(content)
    caller = Caller(objects, prepare(objects))
    count = caller.finish()
    if caller.error is not None:
        raise caller.error
    return count


def orders(*counts):
    """Every order of so many steps of several callers, as tuples of their numbers."""
    if not any(counts):
        yield ()
    for number, count in enumerate(counts):
        if count:
            left = (*counts[:number], count - 1, *counts[number + 1 :])
            yield from ((number, *rest) for rest in orders(*left))


def play(content, prepares, order, *, killed=None, watch=lambda objects: None):
    """Let callers take their steps in ``order``; then all but ``killed``, who dies there, do the rest.

    Args:
        content: of the store.
        prepares: functions that are given the objects and return what a caller does.
        order: numbers of callers.
        killed: number of the one who dies.
        watch: called with the objects after each step.

    Returns:
        The objects, and what each caller raised.
    """
    objects = Stepped(content)
    callers = [Caller(objects, do) for do in [prepare(objects) for prepare in prepares]]
    for number in order:
        callers[number].step()
        watch(objects)
    if killed is not None:
        callers[killed].kill()
    for caller in callers:
        while not caller.over:
            caller.step()
            watch(objects)
    return objects, [caller.error for caller in callers]

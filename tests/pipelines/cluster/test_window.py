"""The window on real schedulers and workers: every way in which a task or a worker can end."""

from __future__ import annotations

import collections
import gc
import random
import signal
import threading
import time

import psutil
import pytest
from distributed import Client

from featstore.errors import StorageError
from featstore.pipelines.cluster.window import Task, run_tasks
from tests.pipelines.cluster.chores import StopError, chore
from tests.pipelines.cluster.processes import processes


class Seen:
    """What a run of tasks has said."""

    def __init__(self, client):
        self.client = client
        self.done, self.failed, self.notes = {}, {}, []
        self.workers = collections.Counter()

    def run(self, tasks, **options):
        here = threading.current_thread()

        def done(task, result, worker):
            assert threading.current_thread() is here
            assert task.key not in self.done
            self.done[task.key] = result
            self.workers[worker] += 1

        def failed(task, reason):
            assert threading.current_thread() is here
            assert task.key not in self.failed
            self.failed[task.key] = reason

        return run_tasks(self.client, chore, tasks, done=done, failed=failed, note=self.notes.append, **options)


def named(words):
    """Tasks of words, by number."""
    return [Task(f"do-chore-{number}", each) for number, each in enumerate(words)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with processes(tmp_path_factory.mktemp("cluster")) as made:
        made.start_workers(2)
        yield made


@pytest.fixture
def client(shared):
    with Client(shared.address, timeout=60) as made:
        made.wait_for_workers(2, timeout=120)
        yield made


@pytest.fixture
def own(tmp_path):
    """A scheduler of the test's own, without workers."""
    with processes(tmp_path) as made:
        yield made


def left_at(client):
    """Tasks that the scheduler still knows; it hears of what is let go a moment later."""
    deadline = time.monotonic() + 20
    while (count := client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))) != 0:
        if time.monotonic() > deadline:
            return count
        time.sleep(0.05)
    return 0


def test_every_task_is_done_once_on_all_workers(client):
    seen = Seen(client)
    statistics = seen.run(named(f"sleep=0.02 {number}" for number in range(60)))
    assert seen.done == {f"do-chore-{number}": str(number) for number in range(60)}
    assert set(seen.workers) == set(client.nthreads())
    assert (statistics.done, statistics.failed, statistics.retried, statistics.died) == (60, 0, 0, 0)
    assert not seen.failed
    assert not seen.notes
    assert left_at(client) == 0


def test_no_tasks_are_no_work(client):
    assert Seen(client).run([]).done == 0


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_tasks_are_taken_as_there_is_room(client, ahead):
    seen, drawn = Seen(client), []
    most = []

    def tasks():
        for task in named("sleep=0.01" for _ in range(80)):
            drawn.append(task.key)
            most.append(len(drawn) - len(seen.done))
            yield task

    statistics = seen.run(tasks(), ahead=ahead)
    assert statistics.done == 80
    # Two workers of two threads.
    assert statistics.most == ahead * 4
    assert max(most) <= ahead * 4


def test_what_raises_is_tried_elsewhere_and_then_given_up(client, tmp_path):
    words = ["raise=value", "raise=memory", "unportable", "exit"]
    seen = Seen(client)
    tasks = named([f"log={tmp_path / str(number)} {word}" for number, word in enumerate(words)] + ["fine"] * 10)
    statistics = seen.run(tasks)
    assert [seen.failed.pop(f"do-chore-{number}") for number in range(4)] == [
        "ValueError: no good",
        "MemoryError",
        "RuntimeError: UnportableError: 1 and 2",
        "SystemExit: 3",
    ]
    assert not seen.failed
    assert (statistics.done, statistics.failed, statistics.retried, statistics.died) == (10, 4, 8, 0)
    for number in range(4):
        processes_tried = (tmp_path / str(number)).read_text().split()
        assert len(processes_tried) == 3
        assert len(set(processes_tried[:2])) == 2


def test_something_fatal_ends_everything(client):
    seen = Seen(client)
    with pytest.raises(StopError, match="enough"):
        seen.run(named(["sleep=0.1", "raise=stop", *["sleep=0.1"] * 1000]), fatal=(StopError,))
    assert len(seen.done) < 20
    assert left_at(client) == 0


def test_an_error_of_whoever_makes_or_takes_tasks_passes_and_leaves_nothing_behind(client):
    def tasks():
        yield from named(["sleep=0.01"] * 10)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        Seen(client).run(tasks())
    assert left_at(client) == 0

    def done(task, result, worker):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks(client, chore, named(["fine"] * 10), done=done, failed=done, note=print)
    assert left_at(client) == 0


def test_two_clients_may_call_their_tasks_alike(client, shared):
    with Client(shared.address) as other:
        seen = [Seen(client), Seen(other)]
        threads = [
            threading.Thread(target=one.run, args=(named(f"sleep=0.02 {letter}" for _ in range(40)),))
            for one, letter in zip(seen, "ab", strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    for one, letter in zip(seen, "ab", strict=True):
        assert collections.Counter(one.done.values()) == {letter: 40}


def test_a_barred_worker_gets_nothing_new(client):
    barred, *others = client.nthreads()
    seen = Seen(client)
    seen.run(named(["sleep=0.01"] * 30), barred={barred})
    assert set(seen.workers) == set(others)


def test_stopping_ends_what_has_begun_and_begins_nothing(client, tmp_path):
    stop = threading.Event()
    tasks = named(
        f"mark={tmp_path / f'begun-{number}'} sleep=1.5 mark={tmp_path / f'ended-{number}'}" for number in range(50)
    )
    seen = Seen(client)
    timer = threading.Timer(0.7, stop.set)
    timer.start()
    statistics = seen.run(tasks, stop=stop)
    begun, ended = (len(list(tmp_path.glob(f"{word}-*"))) for word in ("begun", "ended"))
    assert statistics.done == len(seen.done) == begun == ended == 4
    assert not seen.failed
    assert left_at(client) == 0


def test_the_poisoned_task_alone_is_given_up(own):
    """Default settings of Dask: the task that kills its workers is told from those that die with it."""
    own.start_workers(2)
    with Client(own.address) as client:
        client.wait_for_workers(2, timeout=120)
        seen = Seen(client)
        words = ["sleep=0.05"] * 40
        words[9] = "die"
        words[12] = "sleep=0.05 die"
        statistics = seen.run(named(words))
        assert seen.failed == dict.fromkeys(("do-chore-9", "do-chore-12"), "its worker died")
        assert len(seen.done) == 38
        # Both may be on one worker the first time.
        assert 5 <= statistics.died <= 6
        assert left_at(client) == 0


@pytest.mark.parametrize("word", ["sleep=1000", pytest.param("freeze", marks=pytest.mark.full)])
def test_what_hangs_is_ended_with_its_worker_and_given_up(own, word):
    own.start_workers(2)
    with Client(own.address) as client:
        client.wait_for_workers(2, timeout=120)
        seen = Seen(client)
        words = ["sleep=0.05"] * 30
        words[7] = word
        statistics = seen.run(named(words), timeout_seconds=3, tries=2)
        assert seen.failed == {"do-chore-7": "it took longer than 3 s"}
        assert len(seen.done) == 29
        assert (statistics.restarted, statistics.died) == (2, 0)
        assert left_at(client) == 0


def test_a_worker_that_leaves_as_it_was_asked_to_is_no_failure(own):
    own.start_workers(3)
    with Client(own.address) as client:
        client.wait_for_workers(3, timeout=120)
        first, *_ = client.nthreads()
        seen = Seen(client)
        timer = threading.Timer(0.5, client.retire_workers, ([first],))
        timer.start()
        statistics = seen.run(named(["sleep=0.1"] * 100), tries=1)
        timer.join()
        assert (statistics.done, statistics.failed, statistics.died) == (100, 0, 0)
        assert seen.workers[first] < 50


def test_workers_may_come_late(own):
    with Client(own.address) as client:
        seen = Seen(client)
        timer = threading.Timer(1.5, own.start_workers, (1,))
        timer.start()
        seen.run(named(["sleep=0.01"] * 8))
        assert len(seen.done) == 8
        assert seen.notes == ["no worker is there; waiting for one"]
        timer.join()
        later = threading.Timer(0.5, own.start_workers, (1,))
        later.start()
        seen = Seen(client)
        statistics = seen.run(named(["sleep=0.1"] * 250))
        assert len(seen.workers) == 2
        assert statistics.most == 8
        later.join()


def test_a_lost_scheduler_is_an_error_at_once(own):
    own.start_workers(1)
    with Client(own.address, timeout=5) as client:
        client.wait_for_workers(1, timeout=120)
        timer = threading.Timer(0.5, own.kill_scheduler)
        timer.start()
        start = time.monotonic()
        with pytest.raises(StorageError, match="connection to the Dask scheduler is lost"):
            Seen(client).run(named(["sleep=0.1"] * 10_000))
        assert time.monotonic() - start < 30
        timer.join()


def killed_at_random(own, told, tasks, kills):
    """Kill workers in the middle of tasks; whatever is lost is done again."""
    shuffle = random.Random(0)
    own.start_workers(3)
    with Client(own.address) as client:
        client.wait_for_workers(3, timeout=120)
        seen, ended, killed = Seen(client), threading.Event(), []

        def kill():
            while len(killed) < kills and not ended.wait(shuffle.uniform(0.2, 1.0)):
                if own.kill_one(shuffle):
                    killed.append(time.monotonic())

        killer = threading.Thread(target=kill)
        killer.start()
        words = (f"sleep={shuffle.uniform(0, 0.3):.3f} {number}" for number in range(tasks))
        try:
            statistics = seen.run(named(words), tries=kills + 1)
        finally:
            ended.set()
            killer.join()
        assert seen.done == {f"do-chore-{number}": str(number) for number in range(tasks)}
        assert not seen.failed
        assert left_at(client) == 0
        assert len(killed) >= kills // 2
        assert 1 <= statistics.died <= len(killed)
        told(f"{tasks} tasks, {len(killed)} workers killed, {statistics.retried} tasks tried again")


def test_workers_are_killed_at_random(own, told):
    killed_at_random(own, told, 120, 6)


@pytest.mark.full
def test_workers_are_killed_at_random_often(own, told):
    killed_at_random(own, told, 1000, 50)


def test_nothing_of_a_task_is_left_when_it_has_ended(client):
    """Neither here nor at the scheduler is there more than the tasks under way."""
    counts = []

    def done(task, result, worker):
        if int(task.key.rpartition("-")[2]) % 100 == 99:
            here = sum(type(one) is Task for one in gc.get_objects())
            there = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
            counts.append((here, len(client.futures), there))

    tasks = (Task(f"do-nothing-{number}", f"{number}") for number in range(500))
    statistics = run_tasks(client, chore, tasks, done=done, failed=print, note=print)
    assert statistics.done == 500
    assert len(counts) == 5
    # What is let go is told to the scheduler a moment later.
    assert max(max(count) for count in counts) <= 2 * statistics.most


@pytest.mark.full
def test_memory_is_flat_in_ten_thousand_tasks(own, told):
    """Dask logs its last messages, some thousand of them; after these, 30 kB a task would show."""
    own.start_workers(1)
    with Client(own.address) as client:
        client.wait_for_workers(1, timeout=120)
        both = [psutil.Process(), psutil.Process(own.scheduler_pid)]
        rss = []

        def done(task, result, worker):
            if int(task.key.rpartition("-")[2]) in (4_000, 9_999):
                rss.append([one.memory_info().rss for one in both])

        tasks = (Task(f"do-nothing-{number}", "x" * 30_000) for number in range(10_000))
        run_tasks(client, chore, tasks, done=done, failed=print, note=print)
        early, late = rss
        told(", ".join(f"{a / 1e6:.0f} to {b / 1e6:.0f} MB" for a, b in zip(early, late, strict=True)))
        for before, after in zip(early, late, strict=True):
            assert after - before < 6_000 * 30_000 / 4


def test_a_worker_stopped_by_its_nanny_is_replaced(own):
    """SIGTERM to a worker, as a batch system does it, in the middle of its tasks."""
    own.start_workers(2)
    with Client(own.address) as client:
        client.wait_for_workers(2, timeout=120)
        seen = Seen(client)

        def term():
            own.workers()[0].send_signal(signal.SIGTERM)

        timer = threading.Timer(0.5, term)
        timer.start()
        seen.run(named(["sleep=0.1"] * 60))
        timer.join()
        assert len(seen.done) == 60
        assert not seen.failed

"""Leases: one holder of a block among all who ask, taken over from the dead, and harmless where two hold one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.errors import BusyError, CorruptError, NotCommittedError, StorageError
from featstore.store import leases, partial
from featstore.store import store as stores
from featstore.store.committed import as_records
from featstore.store.leases import Holder, Keeper, Lease, acquire, exclusive, held
from featstore.store.local import LocalObjects
from featstore.store.objects import INTERNAL
from tests.store import stepped
from tests.store.fake_remote import FakeRemote

RUN = "toy/reference/basic-00000000/t050"
FOLDER = f"{INTERNAL}/leases/{RUN.replace('/', '~')}"


class Clock:
    """Stands in for ``time`` in `featstore.store.leases`: it goes on when a test says so, or somebody sleeps."""

    def __init__(self):
        self.now = time.time()

    def time(self):
        return self.now

    monotonic = time

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(leases, "time", made)
    return made


@pytest.fixture(params=["local", "remote"])
def objects(request, tmp_path):
    return LocalObjects(tmp_path) if request.param == "local" else FakeRemote()


def statement(**changes):
    """A lease of a process that lives here, as bytes."""
    pid = os.getpid()
    own = {
        "nonce": "n",
        "host": "here",
        "user": "ada",
        "pid": pid,
        "place": partial.place(),
        "started": partial.started(pid),
        "expires": time.time() + 100,
    }
    return json.dumps(own | changes).encode()


def test_one_holds_it_and_the_others_are_told_who(objects):
    lease = acquire(objects, RUN, 7)
    assert isinstance(lease, Lease)
    other = acquire(objects, RUN, 7)
    assert isinstance(other, Holder)
    assert (other.block, other.pid) == (7, os.getpid())
    assert f"(process {os.getpid()})" in str(other)
    assert held(objects, RUN) == [other]
    neighbour = acquire(objects, RUN, 8)
    assert isinstance(neighbour, Lease)
    lease.release()
    lease.release()
    assert not lease.renew()
    again = acquire(objects, RUN, 7)
    assert isinstance(again, Lease)
    again.release()
    neighbour.release()
    assert held(objects, RUN) == []
    assert objects.names(FOLDER) == []


def test_processes_that_race_never_get_the_same_block(tmp_path, told):
    """They start together, want every block in an order of their own, and keep what they get."""
    code = (
        "import pathlib, random, sys; from featstore.store.leases import Lease, acquire;"
        "from featstore.store.local import LocalObjects; objects = LocalObjects(pathlib.Path(sys.argv[1]));"
        "print('ready', flush=True); sys.stdin.readline(); blocks = list(range(100)); random.shuffle(blocks);"
        f"got = [block for block in blocks if isinstance(acquire(objects, {RUN!r}, block), Lease)];"
        "print(*got, flush=True); sys.stdin.readline()"
    )
    words = [sys.executable, "-c", code, tmp_path]
    racers = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        got = [list(map(int, racer.stdout.readline().split())) for racer in racers]
        # Of two who come at the same moment both may step back, so some may be left: for whoever comes again.
        mine = [block for block in range(100) if isinstance(acquire(LocalObjects(tmp_path), RUN, block), Lease)]
    finally:
        for racer in racers:
            racer.communicate("\n")
    assert Counter(block for blocks in [*got, mine] for block in blocks) == dict.fromkeys(range(100), 1)
    told(f"100 blocks wanted by 4 processes at once: each got by one, {sorted(map(len, got))} by each")


def count_turns(objects, told, turns):
    """Four threads take, renew and give back one lease as fast as they can."""
    inside, most, entered = 0, 0, 0
    guard = threading.Lock()
    errors = []

    def work(seed):
        nonlocal inside, most, entered
        shuffle = random.Random(seed)
        try:
            while entered < turns:
                lease = acquire(objects, RUN, 0)
                if isinstance(lease, Holder):
                    continue
                with guard:
                    inside += 1
                    entered += 1
                    most = max(most, inside)
                for _ in range(shuffle.randrange(4)):
                    assert lease.renew()
                with guard:
                    inside -= 1
                lease.release()
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert most == 1
    assert objects.names(FOLDER) == []
    told(f"{entered} times in turn, renewed up to 3 times each: never two at once")


@pytest.fixture
def patient(monkeypatch):
    """Whoever steps back may take as long as it likes on a busy machine."""
    monkeypatch.setattr(leases, "_RENEWALS", 1000)


@pytest.mark.usefixtures("patient")
def test_it_is_never_held_twice(objects, told):
    count_turns(objects, told, 100)


@pytest.mark.full
@pytest.mark.usefixtures("patient")
def test_it_is_never_held_twice_in_five_thousand_turns(objects, told):
    count_turns(objects, told, 5000)


def taker(objects):
    return lambda: objects.taken.append(acquire(objects, RUN, 0))


def renewer(objects):
    return objects.mine.renew


def releaser(objects):
    return objects.mine.release


def play(callers, order, *, generations=3):
    """Callers of `stepped`, against a lease of ours that has been renewed some times."""

    def prepared(prepare):
        def prepare_once(objects):
            if not hasattr(objects, "taken"):
                objects.taken = []
                objects.mine = acquire(objects, RUN, 0)
                for _ in range(generations):
                    objects.mine.renew()
            return prepare(objects)

        return prepare_once

    return stepped.play({}, [prepared(one) for one in callers], order)


def count_orders(told, mine, count):
    played = Counter()
    for order in sampled(3, count):
        objects, errors = play([mine, taker, taker], order)
        assert errors == [None] * 3
        got = [one for one in objects.taken if isinstance(one, Lease)]
        assert len(got) <= (0 if mine is renewer else 1), order
        played[len(got)] += 1
    told(f"{count} orders of the steps of one holder and two who ask, by how many of these got it: {dict(played)}")


@pytest.mark.parametrize("mine", [renewer, releaser])
def test_two_ask_while_the_holder_renews_or_releases(told, mine):
    """Of two who ask while a lease goes or stays, never both get it, and none does while it stays."""
    count_orders(told, mine, 60)


@pytest.mark.full
@pytest.mark.parametrize("mine", [renewer, releaser])
def test_two_ask_while_the_holder_renews_or_releases_in_many_orders(told, mine):
    count_orders(told, mine, 3000)


@pytest.mark.parametrize("stays", [False, True])
def test_who_steps_back_again_does_not_end_a_lease_and_who_stays_does(objects, clock, monkeypatch, stays):
    """Who has seen the last generation of one who released it may create the very next one of somebody else's lease."""
    lease = acquire(objects, RUN, 0)
    assert objects.put_new(f"{FOLDER}/0.1", statement(nonce="another"))
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 2 and not stays:
            objects.delete(f"{FOLDER}/0.1")

    monkeypatch.setattr(clock, "sleep", sleep)
    assert lease.renew() != stays
    assert len(slept) == (leases._RENEWALS - 1 if stays else 2)
    assert objects.names(FOLDER) == (["0.1"] if stays else ["0.0", "0.1"])
    lease.release()
    assert objects.names(FOLDER) == (["0.1"] if stays else [])


@pytest.mark.parametrize("renewals", [0, 1, 5])
def test_at_no_step_of_renewing_and_releasing_it_looks_free(objects, renewals):
    """Before each request of the holder, up to the deletion that ends it, whoever asks is told that it is held."""
    lease = acquire(objects, RUN, 0)
    looks = []

    def watched(name):
        original = getattr(objects, name)

        def call(*arguments, **options):
            setattr(objects, name, original)  # Those who look make no requests that are looked at.
            assert [holder.block for holder in held(objects, RUN)] == [0]
            assert isinstance(acquire(objects, RUN, 0), Holder)
            looks.append(name)
            setattr(objects, name, call)
            return original(*arguments, **options)

        setattr(objects, name, call)

    watched("put_new")
    watched("delete")
    for _ in range(renewals):
        assert lease.renew()
    left = len(objects.names(FOLDER))
    lease.release()
    assert looks[-left:] == ["delete"] * left
    assert looks.count("delete") == renewals + 1
    assert held(objects, RUN) == []


def test_the_generation_that_says_who_holds_it_is_deleted_last(objects, monkeypatch):
    lease = acquire(objects, RUN, 0)
    for _ in range(3):
        lease.renew()
    there = objects.names(FOLDER)
    assert len(there) == 2
    gone = []
    delete = objects.delete
    monkeypatch.setattr(objects, "delete", lambda key, **options: (gone.append(key), delete(key, **options)))
    lease.release()
    assert gone == [f"{FOLDER}/{name}" for name in there]


def sampled(callers, count):
    """Orders in which callers may take their steps, of more than each of them makes."""
    shuffle = random.Random(0)
    for _ in range(count):
        order = [number for number in range(callers) for _ in range(9)]
        shuffle.shuffle(order)
        yield order


def count_takers(told, count):
    played = Counter()
    for order in sampled(3, count):
        objects, errors = stepped.play({f"{FOLDER}/0.4": statement(expires=time.time() - 1)}, [waiting] * 3, order)
        assert errors == [None] * 3
        got = [one for one in objects.taken if isinstance(one, Lease)]
        assert len(got) <= 1
        played[len(got)] += 1
        if got:
            assert got[0].renew()
    assert played[1]
    told(f"{count} orders of three who find it expired, by how many got it: {dict(played)}")


def test_three_ask_for_one_that_is_expired(told):
    """All of them see that it is over: one of them takes over, in the next generation, or they ask again."""
    count_takers(told, 60)


@pytest.mark.full
def test_three_ask_for_one_that_is_expired_in_many_orders(told):
    count_takers(told, 3000)


def waiting(objects):
    objects.taken = getattr(objects, "taken", [])
    return taker(objects)


def test_an_expired_one_is_taken_over_by_its_next_generation(objects, clock):
    key = f"{FOLDER}/3.5"
    objects.put(key, statement(place="elsewhere", expires=clock.now + 10))
    assert isinstance(acquire(objects, RUN, 3), Holder)
    assert len(held(objects, RUN)) == 1
    clock.now += 11
    assert held(objects, RUN) == []
    before = objects.get(key)
    put = objects.put

    def no_put(*arguments, **options):
        raise AssertionError("a lease was replaced")

    objects.put = no_put
    lease = acquire(objects, RUN, 3)
    objects.put = put
    assert isinstance(lease, Lease)
    assert objects.names(FOLDER) == ["3.6"]
    assert before != objects.get(f"{FOLDER}/3.6")
    lease.release()
    assert objects.names(FOLDER) == []


@pytest.mark.parametrize("reaped", [True, False])
def test_what_a_dead_process_held_is_free_at_once(tmp_path, reaped):
    """On this machine it can be asked whether a process lives, also one whose end nobody has asked about."""
    code = (
        "import pathlib, sys; from featstore.store.leases import acquire;"
        "from featstore.store.local import LocalObjects;"
        f"acquire(LocalObjects(pathlib.Path(sys.argv[1])), {RUN!r}, 0); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    objects = LocalObjects(tmp_path)
    holder = acquire(objects, RUN, 0)
    assert isinstance(holder, Holder)
    assert holder.pid == process.pid
    process.send_signal(signal.SIGKILL)
    if reaped:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        assert held(objects, RUN) == []
        lease = acquire(objects, RUN, 0)
        assert isinstance(lease, Lease)
        assert objects.names(FOLDER) == ["0.1"]
        lease.release()
    finally:
        process.communicate()


def test_a_process_id_that_was_given_again_holds_nothing(objects):
    objects.put(f"{FOLDER}/0.0", statement(started=partial.started(os.getpid()) - 1))
    assert isinstance(acquire(objects, RUN, 0), Lease)


class Ticks:
    """Stands in for the event that ends a keeper: waits by moving the clock, looks, and ends it after some turns."""

    def __init__(self, clock, turns, look):
        self._clock, self._left, self._look = clock, turns, look

    def wait(self, seconds):
        for _ in range(5):
            self._clock.now += seconds / 5
            self._look()
        self._left -= 1
        return self._left < 0

    def set(self):
        pass


def test_the_keeper_renews(objects, clock):
    seen = []

    def look():
        names = objects.names(FOLDER)
        seen.append(([holder.block for holder in held(objects, RUN)], acquire(objects, RUN, 0), len(names)))

    keeper = Keeper()
    keeper._end = Ticks(clock, 6, look)
    for block in range(3):
        keeper.keep(acquire(objects, RUN, block))
    mine = acquire(objects, RUN, 3)
    keeper.keep(mine)
    keeper.release(mine)
    begin = clock.now
    with keeper:
        keeper._thread.join()
        newest = max(int(name.partition(".")[2]) for name in objects.names(FOLDER))
    assert clock.now - begin > 2 * leases.TTL_SECONDS
    assert newest == 6
    for blocks, asked, count in seen:
        assert blocks == [0, 1, 2]
        assert isinstance(asked, Holder)
        assert count <= 2 * 3
    assert objects.names(FOLDER) == []


def test_a_holder_that_slept_through_its_time_has_lost_it(objects, clock):
    sleeper = acquire(objects, RUN, 0)
    sleeper.renew()
    clock.now += leases.TTL_SECONDS + 1
    other = acquire(objects, RUN, 0)
    assert isinstance(other, Lease)
    assert not sleeper.renew()
    sleeper.release()
    assert len(objects.names(FOLDER)) == 1
    assert other.renew()
    other.release()
    late = acquire(objects, RUN, 0)
    clock.now += leases.TTL_SECONDS + 1
    assert not late.renew()  # Nobody has taken it, but somebody may have had it.
    assert objects.names(FOLDER) == []


@pytest.mark.parametrize(
    ("skew_seconds", "alive"), [(0, True), (-30, True), (30, True), (-150, False), (3600, False), (float("nan"), False)]
)
def test_clocks_that_are_wrong(objects, clock, skew_seconds, alive):
    """A third of its time does no harm; a clock that is further off costs work twice, and never a block for ever."""
    objects.put(f"{FOLDER}/0.0", statement(place="elsewhere", expires=clock.now + leases.TTL_SECONDS + skew_seconds))
    assert isinstance(acquire(objects, RUN, 0), Holder) == alive


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 4000, b"1" * 4000, b"x" * 5000, b"{}"])
def test_a_damaged_lease_holds_nothing(objects, data):
    objects.put(f"{FOLDER}/0.2", data)
    assert held(objects, RUN) == []
    lease = acquire(objects, RUN, 0)
    assert isinstance(lease, Lease)
    assert objects.names(FOLDER) == ["0.3"]


@pytest.mark.parametrize("name", ["00.1", "0.01", "0.-1", "x.1", "0.1.2", "0", "0.1e3", "0." + "9" * 30, "²." + "1"])
def test_names_that_are_no_leases_are_passed_over(objects, name):
    objects.put(f"{FOLDER}/{name}", statement())
    assert isinstance(acquire(objects, RUN, 0), Lease)


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)], ids=["folder", "pipe", "loop"]
)
def test_what_is_no_file_holds_nothing_and_ends_in_no_endless_search(tmp_path, make):
    objects = LocalObjects(tmp_path)
    (tmp_path / FOLDER).mkdir(parents=True)
    make(tmp_path / FOLDER / "0.0")
    try:
        assert isinstance(acquire(objects, RUN, 0), Lease)
    except StorageError:
        assert (tmp_path / FOLDER / "0.0").is_symlink()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("nonce", "host", "user", "pid", "place", "started", "expires")


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
def test_a_lease_may_say_anything(changes):
    objects = FakeRemote()
    objects.content[f"{FOLDER}/0.0"] = statement(**changes)
    found = acquire(objects, RUN, 0)
    assert isinstance(found, Lease | Holder)
    assert len(str(found)) < 1000
    held(objects, RUN)


def test_what_is_exclusive(tmp_path, monkeypatch, clock):
    objects = LocalObjects(tmp_path)
    inside = []

    def work(number):
        with exclusive(objects, "toy/zarr.json"):
            inside.append(number)
            assert len(inside) == 1
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    key = f"{INTERNAL}/leases/toy~zarr.json/0.0"
    objects.put(key, statement(place="elsewhere", expires=clock.now + 100))
    with exclusive(objects, "toy/zarr.json"):  # It waits until the other one's time is over.
        assert not objects.exists(key)
    with monkeypatch.context() as patch:
        patch.setattr(leases, "_alive", lambda *_: Holder(block=0, host="far", pid=5, user="eve", expires=0))
        with pytest.raises(BusyError, match=r"eve on far \(process 5\)"), exclusive(objects, "toy/zarr.json"):
            pass


@pytest.mark.parametrize(
    ("first", "second"),
    [((0, 1), (2, 3)), ((0, 1, 2), (1, 2, 3)), ((0, 1, 2, 3), (0, 1, 2, 3))],
    ids=["other rows", "some of the same", "the same"],
)
@pytest.mark.parametrize("before", [(), (4, 5)], ids=["empty", "with neighbours"])
@pytest.mark.parametrize("plays", [15, pytest.param(400, marks=pytest.mark.full)])
def test_two_holders_of_one_block_do_no_harm(lab, monkeypatch, told, first, second, before, plays):
    """Two write one block where nothing locks it, in many orders: no row is ever wrong, none is broken for good.

    Rows of one of them may be gone in the end; the record says so, and the next extraction makes them.
    """
    layers = {"up1": (1, 2, 2)}
    objects = stepped.Stepped({})
    with monkeypatch.context() as patch:
        patch.setattr(stores, "objects_at", lambda url: objects)
        _, run = lab.start("x", 6, layers=layers)
        if before:
            run.write_block(0, before, {"up1": maps(before)})

    def writer(rows):
        def prepare(objects):
            run = stores.Store("x", objects, writable=True).dataset("toy").runs()[0]
            run.reader("up1")
            return lambda: run.write_block(0, rows, {"up1": maps(rows)})

        return prepare

    counts = [stepped.steps_of(objects.content, writer(rows)) for rows in (first, second)]
    shuffle, played, lost = random.Random(0), 0, 0
    every = list(stepped.orders(*counts))
    for order in shuffle.sample(every, min(len(every), plays)):
        left, errors = stepped.play(objects.content, [writer(first), writer(second)], order, watch=check_rows)
        assert errors == [None, None]
        there = check_rows(left, broken=0)
        assert there >= set(before)
        lost += len({*first, *second} - there)
        run = stores.Store("x", left, writable=True).dataset("toy").runs()[0]
        rows = sorted({*range(6)} - there)
        if rows:
            run.write_block(0, rows, {"up1": maps(rows)})
        assert check_rows(left, broken=0) == {*range(6)}
        played += 1
    told(f"{played} orders of {counts} steps: no row wrong or broken; {lost} were lost to the other one and said so")


def maps(rows):
    return np.stack([np.full((1, 2, 2), row + 1, dtype=np.float16) for row in rows])


def check_rows(objects, broken=None):
    """Rows that can be read; each is the one that it should be, or is refused."""
    run = stores.Store("x", objects, writable=False).dataset("toy").runs()[0]
    there, damaged = set(), 0
    for row in range(6):
        try:
            assert (run.numpy("up1", [row]) == row + 1).all()
            there.add(row)
        except NotCommittedError:
            pass
        except CorruptError:
            damaged += 1
    assert broken is None or damaged == broken
    wanted = as_records(run.dataset.samples.digest_bytes(0, 6))
    assert {row for row in range(6) if run.committed("up1")[row] == wanted[row]} >= there
    return there


def test_a_lease_of_the_same_job_is_not_waited_for(objects):
    """A worker is gone with its machine, and the scheduler has given its block to another one."""
    first = acquire(objects, RUN, 5, "job")
    assert isinstance(first, Lease)
    assert isinstance(acquire(objects, RUN, 5), Holder)
    assert isinstance(acquire(objects, RUN, 5, "another"), Holder)
    second = acquire(objects, RUN, 5, "job")
    assert isinstance(second, Lease)
    (holder,) = held(objects, RUN)
    assert holder.job == "job"
    # Should the first one live after all, it neither keeps the block nor takes it from the second.
    first.release()
    assert isinstance(acquire(objects, RUN, 5), Holder)
    second.release()
    assert held(objects, RUN) == []


def test_a_holder_who_renews_while_another_looks_is_seen(objects, monkeypatch):
    """One who is slow between a listing and its reads finds nothing of what was listed."""
    holder = acquire(objects, RUN, 0)
    names, looks = objects.names, []

    def slow_names(folder):
        found = list(names(folder))
        if len(looks) < 2:
            looks.append(found)
            assert all(holder.renew() for _ in range(3))
        return found

    monkeypatch.setattr(objects, "names", slow_names)
    assert isinstance(acquire(objects, RUN, 0), Holder)
    assert len(looks) == 2
    assert holder.renew()

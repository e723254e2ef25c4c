"""Names share a few locks, and one that is held around another never is the other's."""

from __future__ import annotations

from featstore.store.leases import exclusive
from featstore.store.local import LocalObjects
from featstore.store.objects import LOCKS, OUTER, lock_number


def test_a_lock_within_an_exclusive_one_never_waits_for_it(tmp_path):
    """Of as many pairs of names some share a number: with one set of locks the first such pair waits for ever."""
    names = [f"run-{number}" for number in range(2 * LOCKS)]
    shared = [(a, b) for a in names for b in names if lock_number(a) == lock_number(b)]
    assert len(shared) > len(names)
    assert all(lock_number(OUTER + a) != lock_number(b) for a in names for b in names)
    objects = LocalObjects(tmp_path, durable=False)
    for a, b in shared[:20]:
        with exclusive(objects, a), objects.lock(b):
            pass

"""Checking the notes of complete blocks, which spare a plan from looking at records: they must not lie."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from featstore.errors import CorruptError, IncompatibleError, NotFoundError
from featstore.store import completeness
from featstore.store.committed import Record, as_records, read_record
from featstore.store.findings import Findings
from featstore.store.run import Run


def check_complete(run: Run, records: Mapping[str, Record], findings: Findings) -> None:
    """Check the note of a run's complete blocks and its mark; one that lies is withdrawn if that is asked for.

    Args:
        run: the run.
        records: by layer (blocks * block length,) what is there and sound; repairs have been made.
        findings: takes what is found.
    """
    objects, path = run.dataset.objects, run.path

    def withdraw() -> None:
        completeness.clear(objects, path)

    try:
        completeness.check_mark(objects, path)
        completeness.load(objects, path)
    except NotFoundError:
        return
    except (CorruptError, IncompatibleError) as error:
        findings.broken(error, withdraw, done="withdrawn")
        return
    said = completeness.read(objects, path)
    lies = [
        (layer, block)
        for layer in sorted(said.keys() & records.keys())
        for block in _claimed(run, said[layer])
        if _lies(run, layer, block, records[layer])
    ]
    # What was there when it was read may have been uncommitted since, and the note with it.
    again = completeness.read(objects, path) if lies else {}
    lies = [(layer, block) for layer, block in lies if layer in again and block in _claimed(run, again[layer])]
    if lies:
        named = ", ".join(f"{layer} block {block}" for layer, block in lies[:3])
        more = f" and {len(lies) - 3} more" if len(lies) > 3 else ""
        hint = "`featstore verify --repair` withdraws it: the next extract looks at the records"
        damage = f"{completeness.snapshot_key(path)} calls complete what is not: {named}{more}"
        findings.broken(CorruptError(damage, hint=hint), withdraw, done="withdrawn")


def _claimed(run: Run, said: completeness.BlockDigests) -> list[int]:
    """Blocks that the note calls complete."""
    count = min(len(said), run.n_blocks)
    claimed: list[int] = np.flatnonzero(said[:count] == run.block_digests[:count]).tolist()
    return claimed


def _lies(run: Run, layer: str, block: int, sound: Record) -> bool:
    """Whether a block that is called complete lacks rows; broken ones that its record names are no lie of the note."""
    inside = run.block_rows(block)
    wanted = as_records(run.dataset.samples.digest_bytes(inside.start, inside.stop))
    if np.array_equal(sound[inside.start : inside.stop], wanted):
        return False
    try:
        record = read_record(run.dataset.objects, run.path, layer, block, run.block_length)
    except CorruptError:
        return False
    return not np.array_equal(record[: len(inside)], wanted)

"""Reading everything in a store and saying what is wrong with it.

A damaged row is uncommitted by ``repair``, so that the next extraction recomputes it and nothing
else. A damaged document is written anew from what it can be derived from; what cannot be derived (a run's
document, a data set's, its sample table, a basis) is restored from its copy in the catalog.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from featstore.store.findings import Findings, VerifyReport
from featstore.store.orphans import orphans
from featstore.store.run import Run
from featstore.store.store import Store
from featstore.store.verify_blocks import check_layer
from featstore.store.verify_documents import check_dataset, check_run_documents, check_snapshot, data_sets
from featstore.store.verify_snapshots import check_complete

__all__ = ["VerifyReport", "verify"]


def verify(
    store: Store,
    *,
    dataset: str | None = None,
    repair: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Read every document, record and committed map of a store and check each.

    Checked are digests of documents and what they say of each other, recipes against fingerprints and paths, sample
    tables, bases and their copies, crc32c of records, labels, indices, maps and scales, that what is committed is
    there and of the right image, that maps are finite, and that no note calls a block complete that is not.

    Args:
        store: opened for writing if ``repair``.
        dataset: only this data set.
        repair: uncommit broken rows and write damaged documents anew.
        progress: called with blocks done and blocks in all, a block counted once a layer.

    Raises:
        NotFoundError: if there is no data set ``dataset``.
        StorageError: if ``repair`` and the store was opened for reading only, or the disk or the other side fails.
    """
    if repair:
        store.require_writable()
    findings = Findings(repair=repair)
    names = data_sets(store)
    if dataset is not None and dataset not in names:
        store.dataset(dataset)
    checked = [check_dataset(store, name, findings) for name in names if dataset in (None, name)]
    runs = [run for one in checked for run in one.runs]
    total = sum(run.n_blocks * len(run.layers) for run in runs)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for run in runs:
        _check_run(run, findings, advance)
    check_snapshot(store, runs if dataset is None else None, findings)
    if store.objects.can_list:
        findings.orphans += orphans(store.objects, checked, everywhere=dataset is None)
    return findings.report()


def _check_run(run: Run, findings: Findings, advance: Callable[[], None]) -> None:
    seen = np.zeros(run.n_blocks * run.block_length, dtype=np.bool_)
    records = {}
    for layer in run.layers:
        check_run_documents(run, layer, findings)
        records[layer] = check_layer(run, layer, findings, advance)
        seen |= records[layer] != 0
    findings.images += int(seen.sum())
    check_complete(run, records, findings)

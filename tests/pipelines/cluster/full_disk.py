"""Preloaded by workers: no block can be written, as on a disk that has run full since the preflight."""

from __future__ import annotations


def dask_setup(worker):
    from featstore.errors import StorageError
    from featstore.store import Run

    def full(self, block, rows, maps):
        raise StorageError("No space left on device", hint="free space on that disk")

    Run.write_block = full

"""Images that an extraction could not do, and why: from the logs that lie in the store, which keeps it nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np

from featstore.errors import FeatstoreError
from featstore.pictures import Table
from featstore.store import Store, StoredDataset
from featstore.store.run_logs import log_entries

_LOGS = 50
"""The newest logs that are looked at."""
_MAX_ROWS = 200

Reasons = dict[tuple[str, str], tuple[str, str]]
"""Path of a run and key of an image to the reason, and the log that gives it."""


def reasons_of(store: Store) -> Reasons:
    """Why images failed the last time, as far as logs say; empty where there are none or they cannot be listed."""
    found: Reasons = {}
    if not store.objects.can_list:
        return found
    try:
        entries = log_entries(store.objects, limit=_LOGS)
    except FeatstoreError:  # A report is about features; that logs cannot be read does not stop it.
        return found
    for entry in entries:
        failed = entry.facts.get("failed")
        images = failed.get("images") if isinstance(failed, dict) else None
        for image in images if isinstance(images, list) else []:
            if isinstance(image, dict):
                where = (str(image.get("run")), str(image.get("key")))
                found.setdefault(where, (str(image.get("reason")), entry.id))
    return found


def failures(stored: StoredDataset, entry: Any, reasons: Reasons) -> Table | None:
    """Images of a data set that still lack features, with the reason; None if nothing is known of any."""
    rows = []
    named = {where[0] for where in reasons}
    for run in entry["runs"]:
        if run["path"] not in named or run["committed"] == run["images"]:
            continue
        opened = stored.open_run(run["path"])
        for row in np.flatnonzero(~opened.valid(list(opened.layers))).tolist():
            key = stored.samples.keys[row]
            if (run["path"], key) in reasons:
                name = f"{run['technique']} at t = {run['timestep']}, {run['model']}"
                rows.append((name, key, *reasons[run["path"], key]))
    if not rows:
        return None
    more = f" {len(rows) - _MAX_ROWS} more are left out." if len(rows) > _MAX_ROWS else ""
    return Table(
        title=f"{entry['name']}: images that failed, and why",
        columns=("run", "image", "reason", "log"),
        rows=tuple(rows[:_MAX_ROWS]),
        note=f"What the last extractions said, as far as their logs go; `featstore log` has more.{more}",
    )

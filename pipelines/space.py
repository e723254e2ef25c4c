"""Whether a disk can hold what is about to be written, asked before anything is."""

from __future__ import annotations

import shutil
from pathlib import Path

from featstore.errors import BadRequestError, StorageError


def require_space(place: Path, needed_bytes: int, *, what: str, hint: str) -> None:
    """Refuse what the disk of ``place`` cannot hold.

    Args:
        place: file or folder that is going to be there; it need not be yet.
        needed_bytes: what will be written.
        what: its name in the message, in the plural.
        hint: what makes it smaller.

    Raises:
        StorageError: if there is less space; the exit status is that of a bad request, as nothing was started.
    """
    folder = place.absolute()
    while not folder.exists():
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        error = StorageError(
            f"{folder} has {free_bytes / 1e9:.1f} GB free and the {what} take {needed_bytes / 1e9:.1f} GB", hint=hint
        )
        error.exit_code = BadRequestError.exit_code
        raise error

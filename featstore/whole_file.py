"""Files that are whole or not there: whoever looks meanwhile finds the old content or the new one."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

SUFFIX = ".partial"
"""End of the names of files that are being written."""


def write_whole(path: Path, data: bytes | memoryview, *, durable: bool = True) -> None:
    """Write ``data`` as the file ``path``, in the place of what was there; nothing partial is ever left.

    The folder must exist. Several may write the same path at once: each content is whole, and the last one stays.
    The file's mode follows the umask.

    Args:
        path: the file.
        data: all of its content.
        durable: whether it survives a power cut once this has returned; False where it is quickly made again.

    Raises:
        OSError: if the disk fails or refuses; what was there before is then untouched.
    """
    # Beside the file, as a rename stays within a disk, and without its name, which may be as long as names can be.
    partial = path.with_name(f".{uuid.uuid4().hex}{SUFFIX}")
    try:
        # Not mkstemp: its files are readable for their owner only.
        with partial.open("xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable.

    Raises:
        OSError: if the disk fails.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have no fsync for folders; their renames are durable by themselves.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)

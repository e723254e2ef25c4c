"""The folder below which weights of named models are looked for."""

from __future__ import annotations

import os
from pathlib import Path

WEIGHTS_VARIABLE = "FEATSTORE_WEIGHTS"
"""Environment variable that names the folder."""
DEFAULT_ROOT = Path("weights")
"""The folder, unless the variable is set."""


def asked_root(root: Path | None = None) -> Path | None:
    """The folder that somebody named: ``root``, else ``$FEATSTORE_WEIGHTS``; None: nobody did."""
    value = os.environ.get(WEIGHTS_VARIABLE)
    return root or (Path(value).expanduser() if value else None)

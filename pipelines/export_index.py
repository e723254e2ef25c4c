"""What lies beside exported features and says what they are: ``featstore.json``, and a line an image.

``featstore.json`` of an export names its runs; that of a run has the whole recipe, the layers and the data set.
``samples.jsonl`` has a line an image: its key, split and SHA-256, and the file that holds it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import featstore
from featstore.errors import CorruptError, IncompatibleError
from featstore.whole_file import write_whole

FORMAT = 1
"""Version of these files."""
MANIFEST = "featstore.json"
SAMPLES = "samples.jsonl"
_VERSION = "featstore_export"
_MANIFEST_MAX_BYTES = 64 << 20
_LINE_MAX_CHARS = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """One image of an export."""

    key: str
    split: str
    digest: str
    """SHA-256 (hex) of the image that the features were computed from."""
    file: str
    """Name of what holds the features; what that means depends on the format."""


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``featstore.json`` into a folder.

    Raises:
        OSError: if that fails.
    """
    document = {_VERSION: FORMAT, "made_by": f"featstore {featstore.__version__}", **content}
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(folder / MANIFEST, f"{text}\n".encode(), durable=False)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The content of ``featstore.json`` in a folder; None if there is none.

    Raises:
        CorruptError: if it is none of featstore's.
        IncompatibleError: if it is of a newer version.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(_MANIFEST_MAX_BYTES + 1)
        document = json.loads(data) if len(data) <= _MANIFEST_MAX_BYTES else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path} cannot be read: {error}") from error
    version = document.get(_VERSION) if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(version, int):
        raise CorruptError(f"{path} describes no export of featstore")
    if version > FORMAT:
        raise IncompatibleError(f"{path} is of version {version}; up to {FORMAT} are known", hint="upgrade featstore")
    return document


def is_export(folder: Path) -> bool:
    """Whether a folder is a whole export of featstore's, of any version that says so."""
    try:
        manifest = read_manifest(folder)
    except CorruptError:
        return False
    except IncompatibleError:
        return True
    return manifest is not None and "runs" in manifest


def run_folders(manifest: Mapping[str, Any], folder: Path) -> list[str]:
    """Names of the folders of an export's runs, which ``manifest``, read from ``folder``, lists.

    Raises:
        CorruptError: if it lists none, or one that lies elsewhere.
    """
    listed = manifest.get("runs")
    runs = listed if isinstance(listed, list) else []
    names = [run.get("folder") if isinstance(run, Mapping) else None for run in runs]
    sound = [name for name in names if isinstance(name, str) and name not in ("", ".", "..") and "/" not in name]
    if not sound or len(sound) != len(names):
        raise CorruptError(f"{folder / MANIFEST} lists no folders of runs")
    return sound


def write_sample(file: IO[str], sample: Exported) -> None:
    """Add one image's line to an open ``samples.jsonl``."""
    line = {"key": sample.key, "split": sample.split, "sha256": sample.digest, "file": sample.file}
    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_samples(folder: Path) -> Iterator[Exported]:
    """The images of an export, one by one.

    Raises:
        CorruptError: if the list is gone or damaged.
    """
    path = folder / SAMPLES
    try:
        with path.open(encoding="utf-8") as file:
            while text := file.readline(_LINE_MAX_CHARS):
                line = json.loads(text)
                values = [line[name] for name in ("key", "split", "sha256", "file")]
                if not all(isinstance(value, str) for value in values):
                    raise CorruptError(f"{path} is damaged at {text[:80]!r}")
                yield Exported(key=values[0], split=values[1], digest=values[2], file=values[3])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(f"{path} cannot be read: {error}") from error

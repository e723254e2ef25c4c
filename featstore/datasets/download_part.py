"""The part of a file that has been downloaded, and the note beside it of what it is a part of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from featstore.whole_file import write_whole

SUFFIX = ".part"
NOTE_SUFFIX = ".json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Which state of which file."""

    url: str
    etag: str | None
    last_modified: str | None
    total_bytes: int | None

    @property
    def condition(self) -> str | None:
        """For ``If-Range``: a strong ETag, else the time of the last change; None: there is none to rely on."""
        if self.etag is not None:
            return None if self.etag.startswith("W/") else self.etag
        return self.last_modified

    def differs(self, other: State) -> bool:
        """Whether anything says that these are two states."""
        ours, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return any(a != b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None)


class Part:
    """The partial file and its note."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self._note = path, path.with_name(path.name + NOTE_SUFFIX)
        self.state = self._noted()
        self.have_bytes = path.stat().st_size if path.exists() else 0
        state = self.state
        usable = state is not None and state.url == url and state.condition is not None
        if not usable or (state is not None and self.have_bytes > (state.total_bytes or self.have_bytes)):
            self.discard()

    def _noted(self) -> State | None:
        try:
            return State(**json.loads(self._note.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def discard(self) -> None:
        """Forget what is here."""
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
        self.state, self.have_bytes = None, 0

    def start(self, state: State) -> None:
        """Begin a file in that state."""
        self.discard()
        write_whole(self._note, json.dumps(dataclasses.asdict(state)).encode(), durable=False)
        self.path.touch()
        self.state = state

    @property
    def whole(self) -> bool:
        """Whether nothing is missing."""
        return self.state is not None and self.have_bytes == self.state.total_bytes

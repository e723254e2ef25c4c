"""Caption files: a text an image, for ``prompt:caption``.

Three forms are read, all of them UTF-8:

- one JSON object of texts by image key, as people write it: ``{"cats/01.jpg": "a cat on a mat", ..}``;
- JSON lines, each with exactly these two names: ``{"key": "cats/01.jpg", "text": "a cat on a mat"}``;
- what `featstore caption` writes, one JSON object: ``texts`` is an object of the first form, ``digests`` has the
  SHA-256 of the image that a text was made from, ``captioner`` says what made it. A text without a digest was
  written by hand.

The identity of a file in recipes is the digest of all its texts, whatever their form and order: a changed or an added
text makes another recipe. That is coarse on purpose. What a row was computed from is recorded as the digest of its
image alone, so only the recipe can tell an old text from a new one.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from featstore.errors import BadRequestError, NotFoundError, StorageError
from featstore.recipe import canonical_json, sha256_hex
from featstore.whole_file import write_whole

FILE_MAX_BYTES = 256 * 2**20
TEXT_MAX_CHARS = 10_000
_LINE_NAMES = {"key", "text"}
_LINE_MAX_CHARS = 8 * TEXT_MAX_CHARS
_SHOWN = 3

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Captions:
    """The texts of a caption file."""

    path: Path
    """The file."""
    source: str
    """Identity of the texts, for recipes: ``captions/`` and the SHA-256 of the canonical JSON of ``{key: text}``."""
    texts: Mapping[str, str] = dataclasses.field(repr=False, compare=False)
    """The text of each image, by key."""

    def check(self, keys: Iterable[str], wanted: Sequence[str], *, remedy: str) -> None:
        """Make sure that every image that is wanted has a text; warn of texts that belong to none.

        Args:
            keys: all images of the data set.
            wanted: those whose texts are needed.
            remedy: command that makes the missing texts.

        Raises:
            BadRequestError: if some have none; it says how many, and which.
        """
        missing = [key for key in wanted if key not in self.texts]
        if missing:
            raise BadRequestError(
                f"captions file {self.path} has no text for {len(missing)} of {len(wanted)} images: {_some(missing)}",
                hint=f"`{remedy}` adds them",
            )
        unknown = sorted(self.texts.keys() - set(keys))
        if unknown:
            logger.warning(
                "captions file %s: %d of its texts belong to no image of the data set: %s",
                self.path, len(unknown), _some(unknown),
            )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaptionDocument:
    """All that a caption file holds."""

    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    """The text of each image, by key."""
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of the image that a text was made from, by key; texts without one were written by hand."""
    captioner: dict[str, Any] | None = None
    """What made the texts that have digests; None: nothing did."""


def load_captions(path: Path) -> Captions:
    """The texts in a caption file; see the module for its forms.

    Raises:
        NotFoundError: if there is no such file.
        BadRequestError: if it is of none of the forms, too large, has a key twice or a text that is none.
    """
    texts = read_document(path).texts
    return Captions(path=path, source=f"captions/{sha256_hex(canonical_json(texts))}", texts=texts)


def read_document(path: Path) -> CaptionDocument:
    """All that a caption file holds; raises what `load_captions` does."""
    content = _read(path)
    try:
        if _has_lines(content):
            return CaptionDocument(texts=_checked(path, _from_lines(content)))
        value = json.loads(content, object_pairs_hook=_unique)
    except _TwiceError as error:
        raise _refusal(path, f"{error.args[0]!r} is in it twice") from None
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"it is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise _refusal(path, f"it holds a JSON {type(value).__name__} and no object")
    if not isinstance(value.get("texts"), dict):
        return CaptionDocument(texts=_checked(path, value.items()))
    digests, captioner = value.get("digests", {}), value.get("captioner")
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise _refusal(path, "its 'digests' are no object of texts")
    if not isinstance(captioner, dict | None):
        raise _refusal(path, "its 'captioner' is no object")
    return CaptionDocument(texts=_checked(path, value["texts"].items()), digests=digests, captioner=captioner)


def write_document(path: Path, document: CaptionDocument) -> None:
    """Write a caption file, whole or not at all.

    Raises:
        StorageError: if that fails.
    """
    content = json.dumps(dataclasses.asdict(document), indent=1, ensure_ascii=False)
    try:
        write_whole(path, f"{content}\n".encode())
    except OSError as error:
        raise StorageError(f"captions file {path} cannot be written: {error.strerror or error}") from error


class _TwiceError(Exception):
    """A JSON object has a name twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise _TwiceError(counts.most_common(1)[0][0])
    return value


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > FILE_MAX_BYTES:
            raise _refusal(path, f"it is larger than {FILE_MAX_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise NotFoundError(
            f"there is no captions file {path}",
            hint=f"`featstore caption --dataset D --captioner PATH_OR_ID --out {path}` makes one",
        ) from None
    except UnicodeDecodeError as error:
        raise _refusal(path, f"it is no UTF-8: {error.reason}") from None
    except OSError as error:
        raise _refusal(path, error.strerror or str(error)) from None


def _has_lines(content: str) -> bool:
    """Whether a file is JSON lines, which its first line says."""
    first = content.lstrip()[:_LINE_MAX_CHARS].partition("\n")[0]
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and value.keys() == _LINE_NAMES and isinstance(value["text"], str)


def _from_lines(content: str) -> Iterable[tuple[str, Any]]:
    seen: set[str] = set()
    # Not splitlines: a text may hold characters that end a line elsewhere than in JSON lines.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        value = json.loads(line, object_pairs_hook=_unique)
        if not isinstance(value, dict) or value.keys() != _LINE_NAMES or not isinstance(value["key"], str):
            raise ValueError(f'line {number} is not {{"key": .., "text": ..}}')
        if value["key"] in seen:
            raise _TwiceError(value["key"])
        seen.add(value["key"])
        yield value["key"], value["text"]


def _checked(path: Path, pairs: Iterable[tuple[str, Any]]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for key, text in pairs:
        if not isinstance(text, str):
            raise _refusal(path, f"the text of {key!r} is no text: {str(text)[:40]}")
        if len(text) > TEXT_MAX_CHARS:
            raise _refusal(path, f"the text of {key!r} has {len(text)} characters; {TEXT_MAX_CHARS} are taken")
        try:
            (key + text).encode()
        except UnicodeEncodeError:
            raise _refusal(path, f"the text of {key!r} has half a character (a lone surrogate)") from None
        texts[key] = text
    return texts


def _refusal(path: Path, reason: str) -> BadRequestError:
    return BadRequestError(
        f"captions file {path} cannot be used: {reason}",
        hint='it holds one text an image: {"01.jpg": "a cat on a mat", ..}',
    )


def _some(keys: Sequence[str]) -> str:
    return ", ".join(map(repr, keys[:_SHOWN])) + (", .." if len(keys) > _SHOWN else "")

"""JSON documents that carry the digest of their own canonical form.

A flipped bit in a ``zarr.json`` is as bad as one in a shard (a wrong shape, another fingerprint), so
every document names the SHA-256 of itself without that one field: in the attributes of a zarr node
as ``featstore.metadata_sha256``, in the catalog's files at the top.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from featstore.errors import CorruptError, IncompatibleError
from featstore.recipe import canonical_json, sha256_hex
from featstore.store.layout import FORMAT, SAMPLES
from featstore.store.objects import Objects

DIGEST = "metadata_sha256"
MAX_BYTES = 64 << 20
"""Size beyond which a document is not even read."""


def _holder(document: Mapping[str, Any]) -> Any:
    """The object inside ``document`` that carries the digest; None if it has no place for one."""
    if "zarr_format" not in document:
        return document
    attributes = document.get("attributes")
    return attributes.get("featstore") if isinstance(attributes, dict) else None


def _digest(document: Mapping[str, Any]) -> str:
    bare = copy.copy(dict(document))
    if "zarr_format" in bare:
        attributes = dict(bare["attributes"])
        attributes["featstore"] = {k: v for k, v in attributes["featstore"].items() if k != DIGEST}
        bare["attributes"] = attributes
    else:
        bare.pop(DIGEST, None)
    return sha256_hex(canonical_json(bare))


def seal(document: Mapping[str, Any]) -> bytes:
    """``document`` as bytes for the disk, its digest filled in."""
    sealed: dict[str, Any] = json.loads(canonical_json(document))
    _holder(sealed)[DIGEST] = _digest(sealed)
    return canonical_json(sealed)


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """The document in ``data``, checked; ``name`` is for messages.

    Raises:
        CorruptError: if it is no JSON object, or its digest is missing or differs.
        IncompatibleError: if it is sound but of another format.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{name} is damaged: no JSON ({type(error).__name__})", hint=remedy(name)) from None
    holder = _holder(document) if isinstance(document, dict) else None
    if not isinstance(holder, dict):
        raise CorruptError(f"{name} is damaged, or not featstore's: it carries no digest", hint=remedy(name))
    other = isinstance(version := holder.get("format"), int) and version != FORMAT
    # Another format may digest in another way, so only a wrong digest, not a missing one, is damage there.
    if (DIGEST in holder or not other) and holder.get(DIGEST) != _checked_digest(document):
        raise CorruptError(f"{name} is damaged: its content does not match its digest", hint=remedy(name))
    if other:
        raise IncompatibleError(
            f"{name} is of store format {version}; this version reads format {FORMAT}",
            hint="use the featstore that made it, or another --store",
        )
    return dict(document)


def _checked_digest(document: Mapping[str, Any]) -> str | None:
    try:
        return _digest(document)
    except (ValueError, RecursionError):  # NaN, infinities, lone surrogates: nothing we ever wrote
        return None


def remedy(name: str) -> str:
    """What to do about the damaged document ``name`` (a key in the store)."""
    folder, _, file = name.rpartition("/")
    depth = name.count("/")
    if name.startswith("catalog"):
        return "`featstore verify --repair` writes it anew from the runs"
    if depth == 0:
        return "copy zarr.json from a backup or from another store of the same version: it is the same in all of them"
    if f"/{SAMPLES}/" in name and file != "zarr.json":
        return "`featstore verify --repair` restores it from its copy in catalog/"
    if file == "zarr.json" and depth in (1, 4) and not folder.endswith(f"/{SAMPLES}"):
        return (
            f"`featstore verify --repair` restores it from its copy in catalog/, or delete {folder}/ and extract again"
        )
    return "`featstore verify --repair` writes it anew"


def read(objects: Objects, key: str) -> dict[str, Any]:
    """The document at ``key``, checked.

    Raises:
        NotFoundError: if there is none.
        CorruptError, IncompatibleError: as `unseal`.
    """
    return unseal(objects.get(key, max_bytes=MAX_BYTES), key)


def write(objects: Objects, key: str, document: Mapping[str, Any]) -> int:
    """Put ``document`` at ``key``, atomically and durably; returns the bytes written."""
    return objects.put(key, seal(document))


def own(document: Mapping[str, Any]) -> dict[str, Any]:
    """What is featstore's own in the attributes of the zarr node ``document``.

    Raises:
        CorruptError: if it is no zarr node.
    """
    if "zarr_format" not in document:
        raise CorruptError("a document that should describe a zarr node does not")
    value: dict[str, Any] = document["attributes"]["featstore"]
    return value

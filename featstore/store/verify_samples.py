"""Checking a data set's sample table: its parts, their copies, and what describes them."""

from __future__ import annotations

import functools
from typing import Any

from featstore.errors import CorruptError
from featstore.store import metadata, stored_samples
from featstore.store.dataset import StoredDataset
from featstore.store.findings import Findings, check_document
from featstore.store.objects import Objects
from featstore.store.parallel import each
from featstore.store.shard import checksum
from featstore.store.stored_samples import COLUMNS, StoredSamples

_AT_ONCE = 64

Content = bytes | CorruptError
"""What a part or copy holds, or what is wrong with it."""


def check_samples(dataset: StoredDataset, findings: Findings) -> bool:
    """Check the table of ``dataset``, restoring parts and copies from each other; whether it can be used."""
    objects, name, count = dataset.objects, dataset.name, len(dataset.samples)
    # A few at a time: a stranger's store may claim any number of rows, of which the first part is lacking.
    places = range(stored_samples.parts_of(count) * len(COLUMNS))
    for first in range(0, len(places), _AT_ONCE):
        some = [(COLUMNS[place % len(COLUMNS)], place // len(COLUMNS)) for place in places[first : first + _AT_ONCE]]
        found = each(objects, lambda one: _both(objects, name, *one), some)
        usable = [
            _check_part(objects, name, *one, part, copy, findings)
            for one, (part, copy) in zip(some, found, strict=True)
        ]
        if not all(usable):
            findings.incomplete.append(f"runs of data set {name!r} were not checked: its sample table is damaged")
            return False
    _check_documents(objects, name, count, findings)
    dataset.samples = StoredSamples(objects, name, count)
    try:
        dataset.samples.table()
    except CorruptError as error:
        error.hint = _lost(name)
        findings.broken(error)
        return False
    return True


def _both(objects: Objects, name: str, column: str, number: int) -> tuple[Content, Content]:
    """What a part holds, and what its copy does."""
    part, copy = (
        _content(objects, key, column)
        for key in (stored_samples.part_key(name, column, number), stored_samples.copy_key(name, column, number))
    )
    if part != copy and not isinstance(part, CorruptError) and not isinstance(copy, CorruptError):
        # A writer puts the one after the other, and may be between the two.
        part = _content(objects, stored_samples.part_key(name, column, number), column)
    return part, copy


def _content(objects: Objects, key: str, column: str) -> Content:
    try:
        data = stored_samples.read_part(objects, key)
        stored_samples.decoded(column, data, key)
    except CorruptError as error:
        return error
    return data


def _check_part(
    objects: Objects, name: str, column: str, number: int, part: Content, copy: Content, findings: Findings
) -> bool:
    part_key, copy_key = stored_samples.part_key(name, column, number), stored_samples.copy_key(name, column, number)

    def put(key: str, data: bytes) -> None:
        objects.put(key, data, checksum(data))

    if isinstance(part, CorruptError):
        if isinstance(copy, CorruptError):
            part.hint = _lost(name)
            findings.broken(part)
            return False
        findings.broken(part, lambda: put(part_key, copy), done="restored from its copy")
        return findings.repair
    if isinstance(copy, CorruptError):
        findings.broken(copy, lambda: put(copy_key, part))
    elif part != copy:
        damage = CorruptError(f"{copy_key} is no copy of {part_key}", hint=metadata.remedy(copy_key))
        findings.broken(damage, lambda: put(copy_key, part))
    return True


def _lost(name: str) -> str:
    return f"restore {name}/samples/ from a backup, or remove the data set with `featstore rm` and extract again"


def _check_documents(objects: Objects, name: str, count: int, findings: Findings) -> None:
    for key, document in stored_samples.array_documents(name, count):
        check_document(objects, key, document, functools.partial(_fits, name=name, key=key, count=count), findings)


def _fits(found: dict[str, Any], name: str, key: str, count: int) -> bool:
    """Whether a document describes the table, or one that is about to grow."""
    shape = found.get("shape", [count])
    images = shape[0] if isinstance(shape, list) and shape and isinstance(shape[0], int) else -1
    wanted = dict(stored_samples.array_documents(name, images))[key]
    return images >= count and found == metadata.unseal(metadata.seal(wanted), key)

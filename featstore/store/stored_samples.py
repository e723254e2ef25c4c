"""The sample table of a data set as it lies in a store: three zarr arrays in parts, read as far as they are needed.

``<dataset>/samples/key`` and ``split`` are strings, ``digest`` is the SHA-256 of each image, (N, 32) uint8;
each part of `PART_ROWS` rows is one chunk with a crc32c. The group of the data set says how many rows there are.
So opening a data set reads none of them, a block needs one part of the digests, and a table that grows by a few
images rewrites its last parts only. Each part has a copy in ``catalog/``, as nothing else could restore it.

Parts are put before the group's document that counts their rows, and copies before their parts. Rows never move, so
whatever is cut off where, a part says the truth about the rows that are counted, and the next change of the table
finds what a copy is ahead of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from numcodecs.vlen import VLenUTF8

from featstore.errors import CorruptError, NotFoundError
from featstore.store import layout, metadata
from featstore.store.objects import Objects
from featstore.store.parallel import each
from featstore.store.samples import SampleTable
from featstore.store.shard import CRC_BYTES, checksum

PART_ROWS = 4096
"""Rows of a part."""
COLUMNS = ("key", "split", "digest")
_DIGEST_BYTES = 32
_PART_MAX_BYTES = 64 << 20
_PARTS_AT_ONCE = 64
_codec = VLenUTF8()

Rows = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint8]
"""(n, 32), a SHA-256 a row."""


class StoredSamples:
    """N images in their order; row i of every array of the data set belongs to entry i.

    As it was when the data set was opened, but for digests and splits that were replaced before they were first read.

    Args:
        objects: where the store lies.
        dataset: name of the data set.
        count: N.
        table: all of it, if that is known. Whoever computes features of these very images must not have their rows
            said to be of others, should another process replace digests meanwhile.
    """

    def __init__(self, objects: Objects, dataset: str, count: int, table: SampleTable | None = None) -> None:
        self._objects = objects
        self._dataset = dataset
        self._count = count
        self._digest_parts: dict[int, Digests] = {}
        if table is not None:
            self.keys, self.splits, self.digests = table.keys, table.splits, table.digests
            for number in range(parts_of(count)):
                some = table.digests[number * PART_ROWS : (number + 1) * PART_ROWS]
                part = np.frombuffer(bytes.fromhex("".join(some)), dtype=np.uint8)
                self._digest_parts[number] = part.reshape(-1, _DIGEST_BYTES)

    def __len__(self) -> int:
        """N."""
        return self._count

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Name of each image, unique in the table."""
        return self._texts("key")

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """Split that each image belongs to, e.g. ``train``."""
        return self._texts("split")

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 of each image's bytes, 64 lower-case hex digits."""
        text = self.digest_bytes(0, self._count).tobytes().hex()
        return tuple(text[start : start + 64] for start in range(0, len(text), 64))

    def table(self) -> SampleTable:
        """All of it in memory.

        Raises:
            CorruptError: if parts do not make a sound table.
        """
        return SampleTable.checked(self.keys, self.digests, self.splits, f"{self._dataset}/{layout.SAMPLES}")

    def digest_bytes(self, start: int, stop: int) -> Digests:
        """Digests of rows ``start`` to ``stop``, (stop - start, 32) uint8; parts are read once.

        Raises:
            CorruptError: if a part is gone or damaged.
        """
        numbers = range(start // PART_ROWS, -(-stop // PART_ROWS))
        # A few at a time: a stranger's store may claim any number of rows, of which the first part is lacking.
        for some in _batches(numbers):
            lacking = [number for number in some if number not in self._digest_parts]
            self._digest_parts.update(zip(lacking, each(self._objects, self._digest_part, lacking), strict=True))
        if not numbers:
            return np.zeros((0, _DIGEST_BYTES), dtype=np.uint8)
        first = numbers[0] * PART_ROWS
        parts = [self._digest_parts[number] for number in numbers]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[start - first : stop - first]

    def key(self, row: int) -> str:
        """Name of one image, from its part alone."""
        number = row // PART_ROWS
        return read_texts(self._objects, self._dataset, "key", number)[row - number * PART_ROWS]

    def _digest_part(self, number: int) -> Digests:
        return read_digests(self._objects, self._dataset, number)

    def _texts(self, column: str) -> tuple[str, ...]:
        found: list[str] = []
        for some in _batches(range(parts_of(self._count))):
            for part in each(
                self._objects, lambda number: read_texts(self._objects, self._dataset, column, number), some
            ):
                found += part
        return tuple(found[: self._count])


def _batches(numbers: range) -> Iterator[range]:
    for first in range(0, len(numbers), _PARTS_AT_ONCE):
        yield numbers[first : first + _PARTS_AT_ONCE]


def parts_of(count: int) -> int:
    """Parts that a table of ``count`` rows has."""
    return -(-count // PART_ROWS)


def part_key(dataset: str, column: str, number: int) -> str:
    """Key of one part of a column."""
    return f"{dataset}/{layout.SAMPLES}/{column}/c.{number}" + (".0" if column == "digest" else "")


def copy_key(dataset: str, column: str, number: int) -> str:
    """Key of the copy of one part."""
    return f"{layout.CATALOG}/{dataset}~{layout.SAMPLES}~{column}~{number}"


def part_document_key(dataset: str, column: str) -> str:
    """Key of a column's array document."""
    return f"{dataset}/{layout.SAMPLES}/{column}/{layout.ROOT}"


def read_digests(objects: Objects, dataset: str, number: int) -> Digests:
    """A part of the digests, (PART_ROWS, 32); errors of `read_part`."""
    key = part_key(dataset, "digest", number)
    return _digests_in(read_part(objects, key), key)


def read_texts(objects: Objects, dataset: str, column: str, number: int) -> list[str]:
    """A part of the keys or splits, PART_ROWS strings, empty ones beyond the end; errors of `read_part`."""
    key = part_key(dataset, column, number)
    return _texts_in(read_part(objects, key), key)


def decoded(column: str, data: bytes, key: str) -> Digests | list[str]:
    """What a part's content says.

    Raises:
        CorruptError: if it is no part of ``column``.
    """
    return _digests_in(data, key) if column == "digest" else _texts_in(data, key)


def _digests_in(data: bytes, key: str) -> Digests:
    if len(data) != PART_ROWS * _DIGEST_BYTES:
        raise CorruptError(f"{key} is no part of {PART_ROWS} digests", hint=metadata.remedy(key))
    return np.frombuffer(data, dtype=np.uint8).reshape(PART_ROWS, _DIGEST_BYTES)


def _texts_in(data: bytes, key: str) -> list[str]:
    # The count is looked at first: decoding allocates what it says.
    if len(data) < 4 or int.from_bytes(data[:4], "little") != PART_ROWS:
        raise CorruptError(f"{key} is no part of {PART_ROWS} names", hint=metadata.remedy(key))
    try:
        texts: list[str] = _codec.decode(data).tolist()
    except ValueError as error:
        raise CorruptError(f"{key} is damaged: {error}", hint=metadata.remedy(key)) from None
    return texts


def read_part(objects: Objects, key: str) -> bytes:
    """The content of a part or of its copy, its crc32c checked and taken off.

    Raises:
        CorruptError: if it is gone or damaged.
    """
    try:
        data = objects.get(key, max_bytes=_PART_MAX_BYTES)
    except NotFoundError:
        raise CorruptError(f"{key} is gone, though its data set has such rows", hint=metadata.remedy(key)) from None
    if checksum(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise CorruptError(f"{key} is damaged: it does not match its crc32c", hint=metadata.remedy(key))
    return data[:-CRC_BYTES]


def merged(old: StoredSamples, new: SampleTable) -> SampleTable:
    """The table of a data set brought up to date by ``new``: rows never move and never go.

    Known keys keep their row and take the new digest and split; unknown ones are appended.
    """
    if new.keys[: len(old)] == old.keys:  # listed again, perhaps with more behind: as it nearly always is
        return new
    digests, splits, keys = list(old.digests), list(old.splits), list(old.keys)
    row_of = {key: row for row, key in enumerate(keys)}
    for key, digest, split in zip(new.keys, new.digests, new.splits, strict=True):
        row = row_of.get(key)
        if row is None:
            keys.append(key)
            digests.append(digest)
            splits.append(split)
        else:
            digests[row], splits[row] = digest, split
    return SampleTable(keys=tuple(keys), digests=tuple(digests), splits=tuple(splits))


def write_table(objects: Objects, dataset: str, table: SampleTable, old: StoredSamples | None) -> None:
    """Put the parts of ``table`` that differ from those of ``old``, which is in the store, and their copies."""
    for number in range(parts_of(len(table))):
        rows = slice(number * PART_ROWS, (number + 1) * PART_ROWS)
        for column in COLUMNS:
            values = getattr(table, f"{column}s")[rows]
            if column == "digest":
                data = bytes.fromhex("".join(values))
                stop = 0 if old is None else min(rows.stop, len(old))
                if old is not None and old.digest_bytes(min(rows.start, stop), stop).tobytes() == data:
                    continue
                data += bytes(PART_ROWS * _DIGEST_BYTES - len(data))
            elif old is None or getattr(old, f"{column}s")[rows] != values:
                data = bytes(_codec.encode(np.array([*values, *[""] * (PART_ROWS - len(values))], dtype=object)))
            else:
                continue
            for key in (copy_key(dataset, column, number), part_key(dataset, column, number)):
                objects.put(key, data, checksum(data))
    if old is None or len(old) != len(table):
        for key, document in array_documents(dataset, len(table)):
            metadata.write(objects, key, document)


def array_documents(dataset: str, count: int) -> list[tuple[str, dict[str, Any]]]:
    """Keys and content of the zarr documents of a table of ``count`` rows."""
    texts: dict[str, Any] = {"data_type": "string", "fill_value": "", "dimension_names": ["image"]}
    text = [{"name": "vlen-utf8", "configuration": {}}, {"name": "crc32c"}]
    digests: dict[str, Any] = {"data_type": "uint8", "fill_value": 0, "dimension_names": ["image", "byte"]}
    raw = [{"name": "bytes"}, {"name": "crc32c"}]
    return [
        (f"{dataset}/{layout.SAMPLES}/{layout.ROOT}", layout.group_document(layout.SAMPLES, {})),
        *(
            (
                part_document_key(dataset, column),
                layout.array_document(layout.SAMPLES, [count], [PART_ROWS], codecs=text, **texts),
            )
            for column in ("key", "split")
        ),
        (
            part_document_key(dataset, "digest"),
            layout.array_document(
                layout.SAMPLES, [count, _DIGEST_BYTES], [PART_ROWS, _DIGEST_BYTES], codecs=raw, **digests
            ),
        ),
    ]


def rows_of(samples: StoredSamples, keys: Sequence[str]) -> Rows:
    """Row of each of ``keys``, (n,) int64, -1 where there is none."""
    known = samples.keys
    # A data set that is listed again has its images where they were.
    if tuple(keys) == known[: len(keys)]:
        return np.arange(len(keys))
    row_of = {key: row for row, key in enumerate(known)}
    return np.array([row_of.get(key, -1) for key in keys], dtype=np.int64)

"""What ``--reduce`` projects a layer's channels onto: kept with the run, written once, the same for everybody.

``<run>/reduce/<layer>`` is one float32 array (1 + N, C) in one chunk: the mean, then the N components. It is one
object, so that one create-only put decides between several who fitted it at once: the first one's basis is the
run's, and all others take it. It is put before the run's document names the layer, which from then on holds its
SHA-256. A copy lies in the catalog, as nothing else could restore it: another fit may differ in its last bits.

Shapes: C channels of the model's layer, N components.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError, CorruptError, NotFoundError
from featstore.recipe import sha256_hex
from featstore.store import layout, metadata
from featstore.store.objects import Objects
from featstore.store.shard import CRC_BYTES, checksum

MAX_BYTES = 128 << 20
"""Size of a basis beyond which it is refused: a thousand components of thirty thousand channels."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Basis:
    """A projection of C channels onto N: components @ (x - mean)."""

    mean: npt.NDArray[np.float32]
    """(C,)"""
    components: npt.NDArray[np.float32]
    """(N, C), rows of length 1, at right angles."""
    explained: float
    """Share of the sample's variance that the N components hold, 0..1."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reduced:
    """What a run's document says of the basis of a layer."""

    channels: int
    """C, of the model's layer."""
    explained: float = dataclasses.field(compare=False)
    """Share of the sample's variance that is kept, 0..1."""
    sha256: str
    """Of the basis' bytes."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Reduced:
        """What `dataclasses.asdict` made.

        Raises:
            CorruptError: if it is none.
        """
        found = cls(channels=value["channels"], explained=value["explained"], sha256=value["sha256"])
        if (
            type(found.channels) is not int
            or not 0 < found.channels < 1 << 24
            or not isinstance(found.explained, (int, float))
            or re.fullmatch("[0-9a-f]{64}", found.sha256) is None
        ):
            raise CorruptError(f"{dict(value)!r} does not describe a basis")
        return found


def basis_key(run: str, layer: str) -> str:
    """Key of a layer's basis."""
    return f"{run}/{layout.REDUCE}/{layer}/c.0.0"


def document_key(run: str, layer: str) -> str:
    """Key of the array document of a layer's basis."""
    return f"{run}/{layout.REDUCE}/{layer}/{layout.ROOT}"


def copy_key(run: str, layer: str) -> str:
    """Key of the copy of a layer's basis."""
    return f"{layout.CATALOG}/{run.replace('/', '~')}~{layout.REDUCE}~{layer}"


def document(components: int, channels: int) -> dict[str, Any]:
    """The array's document."""
    shape = [1 + components, channels]
    return layout.array_document(
        layout.REDUCE,
        shape,
        shape,
        data_type="float32",
        fill_value="NaN",
        codecs=[{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        dimension_names=["row", "channel"],
    )


def keep(objects: Objects, run: str, layer: str, basis: Basis) -> Reduced:
    """Put a layer's basis if there is none yet; what its run's document is to say of the one that is there then.

    Only for a layer that no run's document names: a damaged basis, which nothing goes by yet, is replaced.

    Raises:
        BadRequestError: for a basis that is not finite or whose shapes do not fit.
        StorageError: if the disk fails or refuses.
    """
    components, channels = basis.components.shape
    rows = np.vstack([basis.mean[None], basis.components]).astype("<f4")
    if not np.isfinite(rows).all():
        raise BadRequestError(f"the basis of layer {layer!r} is not finite")
    if rows.nbytes > MAX_BYTES:
        raise BadRequestError(f"the basis of layer {layer!r} has {rows.nbytes} bytes; at most {MAX_BYTES} are kept")
    data = rows.tobytes()
    key = basis_key(run, layer)
    if not objects.put_new(key, data, checksum(data)):
        try:
            data = _content(objects, key, len(data))
        except CorruptError:
            objects.put(key, data, checksum(data))
    objects.put(copy_key(run, layer), data, checksum(data))
    metadata.write(objects, document_key(run, layer), document(components, channels))
    return Reduced(channels=channels, explained=basis.explained, sha256=sha256_hex(data))


def load(objects: Objects, run: str, layer: str, said: Reduced, components: int) -> Basis:
    """The basis of a layer, checked against what the run's document says of it.

    Raises:
        CorruptError: if it is gone, damaged or another one.
    """
    key = basis_key(run, layer)
    remedy = "`featstore verify --repair` restores it from its copy in catalog/"
    length = 4 * (1 + components) * said.channels
    try:
        data = _content(objects, key, length)
    except CorruptError as error:
        raise CorruptError(str(error), hint=remedy) from None
    if sha256_hex(data) != said.sha256:
        raise CorruptError(f"{key} is not the basis that its run's features were made with", hint=remedy)
    rows = np.frombuffer(data, dtype="<f4").reshape(1 + components, said.channels).astype(np.float32)
    return Basis(mean=rows[0], components=rows[1:], explained=said.explained)


def restore(objects: Objects, run: str, layer: str, said: Reduced, components: int) -> None:
    """Put a layer's basis back from its copy, or the copy from the basis.

    Raises:
        CorruptError: if neither is what the run's document says.
    """
    keys = (basis_key(run, layer), copy_key(run, layer))
    for key in keys:
        try:
            data = _content(objects, key, 4 * (1 + components) * said.channels)
        except CorruptError:
            continue
        if sha256_hex(data) == said.sha256:
            for other in keys:
                objects.put(other, data, checksum(data))
            return
    raise CorruptError(
        f"{keys[0]} and its copy in catalog/ are both damaged",
        hint="what is extracted can be read, but not continued: `featstore rm` the run and extract it again",
    )


def check_copy(objects: Objects, run: str, layer: str, said: Reduced, components: int) -> None:
    """See to it that the copy of a layer's basis could restore it.

    Raises:
        CorruptError: if it could not.
    """
    data = _content(objects, copy_key(run, layer), 4 * (1 + components) * said.channels)
    if sha256_hex(data) != said.sha256:
        raise CorruptError(f"{copy_key(run, layer)} is a copy of another basis")


def _content(objects: Objects, key: str, length: int) -> bytes:
    """The ``length`` bytes at ``key``, their crc32c checked and taken off."""
    if length > MAX_BYTES:
        raise CorruptError(f"{key} is said to have {length} bytes; at most {MAX_BYTES} are sound")
    try:
        data = objects.get(key, max_bytes=length + CRC_BYTES)
    except NotFoundError:
        raise CorruptError(f"{key} is gone") from None
    if len(data) != length + CRC_BYTES or checksum(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
        raise CorruptError(f"{key} is damaged: it does not match its crc32c")
    return data[:-CRC_BYTES]

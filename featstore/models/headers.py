"""Names and shapes of the tensors in safetensors files, read from their headers alone. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.errors import BadRequestError, NotFoundError

if TYPE_CHECKING:
    from featstore.models.source import ModelSource

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
"""Shapes of tensors by their names."""

_MAX_BYTES = 100_000_000
"""A longer header is none: safetensors has the same limit."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a safetensors file says of itself."""

    shapes: Shapes
    """Shapes of its tensors."""
    metadata: Mapping[str, str]
    """Free text by name."""


def read_header(path: Path, what: str) -> Header:
    """The header of a safetensors file.

    Args:
        path: the file.
        what: what it is to the reader, for the message: "LoRA x.safetensors".

    Raises:
        NotFoundError: if there is no such file.
        BadRequestError: if it is no safetensors file, or cut off.
    """
    try:
        return _parsed(path)
    except FileNotFoundError:
        raise NotFoundError(f"there is no {what}") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, struct.error) as error:
        raise BadRequestError(
            f"{what} cannot be read as safetensors: {error}", hint="the file is damaged or of another format"
        ) from error


def _parsed(path: Path) -> Header:
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(size_bytes - 8, _MAX_BYTES):
            raise ValueError("its header is cut off")
        content = json.loads(stream.read(length))
    metadata = {str(name): str(text) for name, text in content.pop("__metadata__", {}).items()}
    end_bytes = 8 + length + max((entry["data_offsets"][1] for entry in content.values()), default=0)
    if end_bytes != size_bytes:
        raise ValueError(f"it announces {end_bytes} bytes and has {size_bytes}")
    return Header(shapes={name: tuple(entry["shape"]) for name, entry in content.items()}, metadata=metadata)


def adaptable_shapes(model: ModelSource) -> dict[str, Shapes] | None:
    """Shapes of the parameters of a model's denoiser and text encoders, by component, without loading them.

    None if the weights are in files whose header does not say so (pickles).

    Raises:
        NotFoundError: if weights are missing.
        BadRequestError: if they are damaged.
    """
    shapes: dict[str, Shapes] = {}
    for component, weights in model.component_weights.items():
        if component not in ("unet", "transformer") and not component.startswith("text_encoder"):
            continue
        files = [file for file in weights.files if file.suffix != ".json"]
        if any(file.suffix != ".safetensors" for file in files):
            return None
        shapes[component] = {
            name: shape for file in files for name, shape in read_header(file, f"file {file}").shapes.items()
        }
    return shapes


def kernel_free(shape: Shape) -> Shape:
    """A weight's shape without a kernel of one: a 1 x 1 convolution is a matrix."""
    return shape[:2] if len(shape) > 2 and math.prod(shape[2:]) == 1 else shape


def written(shape: Shape) -> str:
    """A shape for people: ``320 x 768``."""
    return " x ".join(str(size) for size in shape) or "a number"


def some(names: Sequence[str]) -> str:
    """The first few of many names, for people."""
    return ", ".join(names[:3]) + (", .." if len(names) > 3 else "")

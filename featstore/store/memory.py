"""Room in memory for what a store says it holds, which a stranger's store may exaggerate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError


def room_for(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An uninitialised array.

    Raises:
        BadRequestError: if this machine has no room for it.
    """
    try:
        return np.empty(shape, dtype=dtype)
    except (MemoryError, ValueError):  # ValueError: more bytes than there are addresses
        size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        raise BadRequestError(
            f"{shape[0]} maps of {math.prod(shape[1:])} numbers take {size_bytes} bytes, more than there is room for",
            hint="read fewer images at once",
        ) from None

"""Maps on their way from the device to the host: converted there, checked there, copied while it goes on.

Shapes: n rows of a pass, B rows of a batch, C channels, H W map height and width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from featstore.errors import BadRequestError

FloatArray = npt.NDArray[np.floating]
_PRECISIONS = {"float16": torch.float16, "float32": torch.float32}


class HostMaps:
    """The maps of one pass in host memory, filled batch by batch.

    On a GPU the copies run on a stream of their own into pinned memory, so that the next batch is computed
    meanwhile; `wait` is what waits for them.

    Args:
        rows: n, rows of the pass.
        precision: element type: ``float16`` or ``float32``.
        stream: where copies run; None: in place, on a CPU.

    Raises:
        BadRequestError: for another precision.
    """

    def __init__(self, rows: int, precision: str, stream: torch.cuda.Stream | None) -> None:
        self._rows = rows
        self._precision = precision
        self._dtype = torch_precision(precision)
        self._stream = stream
        self._copied: torch.cuda.Event | None = None
        self._maps: dict[str, torch.Tensor] = {}
        self._peaks: dict[str, torch.Tensor] = {}

    def put(self, layer: str, start: int, maps: torch.Tensor) -> None:
        """Copy rows ``start``.. of a layer, (B, C, H, W) in any floating type, on the device."""
        if self._stream is None:
            self._copy(layer, start, maps)
            return
        self._stream.wait_stream(torch.cuda.current_stream(maps.device))
        with torch.cuda.stream(self._stream):
            self._copy(layer, start, maps)
            # An event and not the stream is waited for: the next pass' copies follow on the same stream.
            self._copied = self._stream.record_event()
        maps.record_stream(self._stream)

    def _copy(self, layer: str, start: int, maps: torch.Tensor) -> None:
        pinned = self._stream is not None
        if layer not in self._maps:
            self._maps[layer] = torch.empty((self._rows, *maps.shape[1:]), dtype=self._dtype, pin_memory=pinned)
            self._peaks[layer] = torch.zeros(self._rows, pin_memory=pinned)
        stop = start + len(maps)
        self._maps[layer][start:stop].copy_(maps.to(self._dtype), non_blocking=pinned)
        # Both ends of the range are NaN where any value is.
        low, high = maps.flatten(1).aminmax(dim=1)
        self._peaks[layer][start:stop].copy_(torch.maximum(high, -low).float(), non_blocking=pinned)

    def wait(self) -> tuple[dict[str, FloatArray], dict[int, str]]:
        """The maps of each layer, (n, C, H, W), once all copies have arrived, and the rows not fit to be stored.

        A row is unfit if it holds NaN or infinity, or a value that overflows the precision; it is given with the
        reason, naming the layer. Other rows are not touched by those.
        """
        if self._copied is not None:
            self._copied.synchronize()
        bad: dict[int, str] = {}
        for layer, peaks in self._peaks.items():
            stored = peaks.to(self._dtype)
            for row in torch.nonzero(~torch.isfinite(stored)).flatten().tolist():
                peak = peaks[row].item()
                known = np.isfinite(peak)
                reason = f"overflow of {self._precision} (magnitude {peak:.3g})" if known else "NaN or infinity"
                bad.setdefault(row, f"{reason} in {layer}")
        return {layer: maps.numpy() for layer, maps in self._maps.items()}, bad


def torch_precision(name: str) -> torch.dtype:
    """The torch type of a precision on disk.

    Raises:
        BadRequestError: if it is none.
    """
    if name not in _PRECISIONS:
        raise BadRequestError(f"precision {name!r} is not one of {', '.join(_PRECISIONS)}")
    return _PRECISIONS[name]

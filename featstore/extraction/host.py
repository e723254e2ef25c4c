"""Maps on their way from the device to the host: converted there, checked there, copied while it goes on.

Shapes: n rows of a pass, B rows of a batch, C channels, H W map height and width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from featstore.extraction.reduce import Projection
from featstore.store import precision as precisions
from featstore.store.precision import Quantised, StoredMaps

_TYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.int8}


class HostMaps:
    """The maps of one pass in host memory, filled batch by batch.

    On a GPU the copies run on a stream of their own into pinned memory, so that the next batch is computed
    meanwhile; `wait` is what waits for them.

    Args:
        rows: n, rows of the pass.
        precision: name of a precision on disk.
        stream: where copies run; None: in place, on a CPU.
        projections: what reduces the channels of layers, by their names; on the device.

    Raises:
        BadRequestError: for another precision.
    """

    def __init__(
        self,
        rows: int,
        precision: str,
        stream: torch.cuda.Stream | None,
        projections: Mapping[str, Projection] | None = None,
    ) -> None:
        self._rows = rows
        self._precision = precisions.of(precision)
        self._stream = stream
        self._projections = projections or {}
        self._copied: torch.cuda.Event | None = None
        self._maps: dict[str, torch.Tensor] = {}
        self._scales: dict[str, torch.Tensor] = {}
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
        if layer in self._projections:
            maps = self._projections[layer](maps)
        if self._precision.scaled:
            stored, scales, peaks = quantise(maps)
            self._keep(self._scales, layer, start, scales)
        else:
            stored = maps.to(_TYPES[self._precision.name])
            # Both ends of the range are NaN where any value is.
            low, high = maps.flatten(1).aminmax(dim=1)
            peaks = torch.maximum(high, -low).float()
        self._keep(self._maps, layer, start, stored)
        self._keep(self._peaks, layer, start, peaks)

    def _keep(self, kept: dict[str, torch.Tensor], layer: str, start: int, values: torch.Tensor) -> None:
        """Copy ``values`` of B rows to their place among those of n."""
        pinned = self._stream is not None
        if layer not in kept:
            kept[layer] = torch.empty((self._rows, *values.shape[1:]), dtype=values.dtype, pin_memory=pinned)
        kept[layer][start : start + len(values)].copy_(values, non_blocking=pinned)

    def wait(self) -> tuple[dict[str, StoredMaps], dict[int, str]]:
        """The maps of each layer, n of them, once all copies have arrived, and the rows not fit to be stored.

        A row is unfit if it holds NaN or infinity, or a value that overflows what readers are given; it comes with
        the reason, naming the layer. Other rows are not touched by those.
        """
        if self._copied is not None:
            self._copied.synchronize()
        bad: dict[int, str] = {}
        read = self._precision.read.name
        for layer, peaks in self._peaks.items():
            for row in torch.nonzero(~torch.isfinite(peaks.to(_TYPES[read]))).flatten().tolist():
                bad.setdefault(row, f"{precisions.unfit(peaks[row].item(), read)} in {layer}")
        return {layer: self._stored(layer) for layer in self._maps}, bad

    def _stored(self, layer: str) -> StoredMaps:
        values = self._maps[layer].numpy()
        return Quantised(values, self._scales[layer].numpy()) if layer in self._scales else values


def quantise(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`featstore.store.precision.quantise` on the maps' device, bit for bit; nothing is refused here.

    Args:
        maps: (B, C, H, W) in any floating type.

    Returns:
        int8 (B, C, H, W), float32 scales (B, C), and float32 (B,): the largest magnitude of each row, as it is or as
        it is read back, NaN or infinite where a value is.
    """
    wide = maps.float()
    low, high = wide.flatten(2).aminmax(dim=2)
    largest = torch.maximum(high, -low)
    # A tensor, not a number: a GPU would multiply by the rounded 1 / 127.
    scales = largest / largest.new_full((), precisions.Q_MAX)
    peaks = torch.maximum(largest, scales * precisions.Q_MAX).amax(1)
    scales = torch.where(scales < precisions.SCALE_MIN, 0.0, scales)
    quotients = wide / torch.where(scales == 0.0, 1.0, scales)[:, :, None, None]
    return quotients.round_().to(torch.int8), scales, peaks

"""Maps on their way to the host: the precisions, and what is found unfit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featstore.errors import BadRequestError
from featstore.extraction.host import HostMaps, quantise
from featstore.extraction.reduce import Projection
from featstore.store import precision as precisions
from featstore.store.basis import Basis
from featstore.store.precision import Quantised


def maps_of(rows, channels=6, side=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    sizes = torch.tensor([1.0, 1e-3, 3e4, 0.0, 1e-40, 2.0])[:channels, None, None]
    return (torch.randn((rows, channels, side, side), generator=generator).clamp(-2, 2) * sizes).to(dtype)


def hosted(precision, maps, batch=2, **options):
    host = HostMaps(len(maps), precision, None, **options)
    for start in range(0, len(maps), batch):
        host.put("one", start, maps[start : start + batch])
    stored, bad = host.wait()
    return stored["one"], bad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_is_what_numpy_makes_of_the_same_numbers(dtype):
    maps = maps_of(5, dtype=dtype)
    stored, bad = hosted("int8", maps)
    expected = precisions.quantise(maps.float().numpy())
    assert bad == {}
    assert isinstance(stored, Quantised)
    assert (stored.values.dtype, stored.scales.dtype) == (np.int8, np.float32)
    assert stored.values.tobytes() == expected.values.tobytes()
    assert stored.scales.tobytes() == expected.scales.tobytes()
    assert (stored.scales[:, 3] == 0).all()


def test_int8_of_a_row_is_that_of_the_row_alone():
    maps = maps_of(5)
    whole, _ = hosted("int8", maps, batch=5)
    for row in range(5):
        values, scales, _ = quantise(maps[row : row + 1])
        assert values.numpy().tobytes() == whole.values[row].tobytes()
        assert scales.numpy().tobytes() == whole.scales[row].tobytes()


@pytest.mark.parametrize(("precision", "read"), [("float16", "float16"), ("int8", "float16"), ("float32", "float32")])
def test_rows_that_cannot_be_stored_are_named(precision, read):
    maps = maps_of(6)
    maps[1, 2, 0, 0] = torch.nan
    maps[2, 0, 1, 1] = -torch.inf
    maps[3, 5, 2, 2] = -65519.0
    maps[4, 5, 2, 2] = 65520.0
    stored, bad = hosted(precision, maps)
    expected = {1: "NaN or infinity in one", 2: "NaN or infinity in one"}
    if read == "float16":
        expected[4] = "overflow of float16 (magnitude 6.55e+04) in one"
    assert bad == expected
    clean, _ = hosted(precision, torch.where(maps.isfinite(), maps, 0.0))
    for row in (0, 3, 5):
        for ours, theirs in zip(arrays_of(stored), arrays_of(clean), strict=True):
            assert ours[row].tobytes() == theirs[row].tobytes()


def arrays_of(stored):
    return (stored.values, stored.scales) if isinstance(stored, Quantised) else (stored,)


def test_an_unknown_precision_is_refused():
    with pytest.raises(BadRequestError, match="known: float16, float32, int8"):
        HostMaps(1, "int4", None)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_layers_are_reduced_before_they_are_converted(precision):
    rng = np.random.default_rng(0)
    maps = maps_of(4, channels=2)
    rows, _ = np.linalg.qr(rng.standard_normal((2, 2)))
    basis = Basis(
        mean=np.array([5.0, -3.0], np.float32), components=np.ascontiguousarray(rows[:1], np.float32), explained=0.5
    )
    projection = Projection(basis, torch.device("cpu"))
    stored, bad = hosted(precision, maps, projections={"one": projection, "other": projection})
    by_hand = np.einsum("nc,bchw->bnhw", basis.components, maps.numpy() - basis.mean[:, None, None])
    expected = precisions.encoded(by_hand, precision)
    assert bad == {}
    for ours, theirs in zip(arrays_of(stored), arrays_of(expected), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1 if ours.dtype == np.int8 else 1e-3)

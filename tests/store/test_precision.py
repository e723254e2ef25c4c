"""int8 with a scale an image and channel: what is lost, what is not, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.errors import BadRequestError
from featstore.store import precision as precisions
from featstore.store.precision import Quantised, dequantise, encoded, quantise

SMALLEST = 127 * float(np.finfo(np.float32).smallest_normal)

shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
floats = st.one_of(
    st.floats(-65000, 65000, width=32),
    st.floats(-(2.0**-100), 2.0**-100, width=32),
    st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-126), 2.0**-119, 65504.0, -65504.0, 0.5, 1.5, 63.5, 126.5, 127.0]),
)
maps = shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=floats))


def by_hand(x):
    """The definition again, image by image and channel by channel, in plain Python and numpy scalars."""
    q, scales = np.zeros(x.shape, dtype=np.int8), np.zeros(x.shape[:2], dtype=np.float32)
    for image, channels in enumerate(x):
        for number, channel in enumerate(channels):
            largest = max(abs(value) for value in channel.ravel().tolist())
            scale = np.float32(np.float32(largest) / np.float32(127))
            if scale >= np.finfo(np.float32).smallest_normal:
                scales[image, number] = scale
                # round() of a Python number rounds half to even.
                q[image, number] = [[round(float(value / scale)) for value in row] for row in channel]
    return q, scales


def read_back(stored):
    out = np.empty(stored.values.shape, dtype=np.float16)
    dequantise(stored, out)
    return out


@settings(max_examples=300, deadline=None)
@given(maps)
def test_no_value_is_off_by_more_than_half_a_scale(x):
    stored = quantise(x)
    q, scales = by_hand(x)
    np.testing.assert_array_equal(stored.values, q)
    np.testing.assert_array_equal(stored.scales, scales)
    wide = stored.scales[:, :, None, None].astype(np.float64)
    product = stored.values * wide
    # The quotient is rounded to float32 before it is rounded to a whole number.
    assert (np.abs(x - product) <= np.maximum(0.5 * wide * (1 + 2**-15), np.where(wide == 0, SMALLEST, 0))).all()
    assert np.abs(stored.values).max() <= 127
    assert ((stored.scales == 0) == (np.abs(x).max(axis=(2, 3)) < SMALLEST)).all()
    # What readers get is the product, rounded to float16 once.
    read = read_back(stored)
    np.testing.assert_array_equal(read, (stored.values * stored.scales[:, :, None, None]).astype(np.float16))
    assert (read[x == 0] == 0).all()


def test_halves_are_rounded_to_even():
    x = np.array([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -125.5], dtype=np.float32).reshape(1, 1, 3, 3)
    assert quantise(x).values.ravel().tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126]


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float16, (2, 3, 4, 4), elements=st.floats(-65504, 65504, width=16)))
def test_the_largest_magnitude_of_a_channel_keeps_its_value(x):
    read = read_back(quantise(x))
    peaks = np.abs(x).max(axis=(2, 3), keepdims=True)
    there = (np.abs(x) == peaks) & (peaks > 0)
    np.testing.assert_array_equal(read[there], x[there])


def test_channels_of_zeros_read_as_exact_zeros():
    x = np.zeros((1, 2, 30, 30), dtype=np.float32)
    x[0, 1, 3, 4] = 5.0
    stored = quantise(x)
    assert stored.scales[0, 0] == 0
    np.testing.assert_array_equal(read_back(stored), x.astype(np.float16))


@pytest.mark.parametrize("how", [precisions._with_torch, precisions._with_numpy])
@pytest.mark.parametrize("side", [1, 4, 22, 23, 64, 200])
def test_every_way_of_multiplying_gives_the_product_rounded_once(side, how):
    rng = np.random.default_rng(side)
    x = (rng.standard_normal((2, 5, side, side)) * [[[[1e-7]], [[1]], [[30]], [[1e4]], [[0]]]]).astype(np.float32)
    stored = quantise(x)
    expected = (stored.values.astype(np.float32) * stored.scales[:, :, None, None]).astype(np.float16)
    out = np.empty_like(expected)
    how(stored, out)
    assert out.tobytes() == expected.tobytes()


def test_reading_int8_does_not_import_torch(tmp_path, lab):
    _, run = lab.full(tmp_path / "s", 3, precision="int8")
    code = (
        "import sys, featstore\n"
        f"run = featstore.open({str(tmp_path / 's')!r}).dataset('toy').runs()[0]\n"
        "print(run.numpy('up1', [2]).tobytes().hex(), 'torch' in sys.modules)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert told == [run.numpy("up1", [2]).tobytes().hex(), "False"]


@pytest.mark.parametrize("name", list(precisions.PRECISIONS))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name, value):
    x = np.ones((3, 2, 4, 4), dtype=np.float32)
    x[1, 0, 2, 2] = value
    with pytest.raises(BadRequestError, match="image 1 of these maps: NaN or infinity"):
        encoded(x, name)


@pytest.mark.parametrize("name", ["float16", "int8"])
@pytest.mark.parametrize(("value", "fits"), [(65519.0, True), (-65519.0, True), (65520.0, False), (-1e9, False)])
def test_what_would_overflow_float16_when_read_is_refused(name, value, fits):
    x = np.ones((1, 2, 4, 4), dtype=np.float32)
    x[0, 1, 0, 0] = value
    if fits:
        stored = encoded(x, name)
        read = read_back(stored) if isinstance(stored, Quantised) else stored
        assert np.isfinite(read).all()
        assert read[0, 1, 0, 0] == np.float16(np.sign(value) * 65504)
    else:
        with pytest.raises(BadRequestError, match="overflow of float16"):
            encoded(x, name)


def test_floats_are_stored_as_they_are():
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4))
    for name in ("float16", "float32"):
        np.testing.assert_array_equal(encoded(x, name), x.astype(name))
    assert isinstance(encoded(x, "int8"), Quantised)
    with pytest.raises(BadRequestError, match="known: float16, float32, int8"):
        encoded(x, "int9")


def test_images_are_taken_as_of_an_array():
    stored = quantise(np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2))
    assert len(stored) == 2
    assert stored.nbytes == 2 * 3 * 4 + 2 * 3 * 4
    for chosen in ([1], slice(1, 2), np.array([False, True])):
        np.testing.assert_array_equal(stored[chosen].values, stored.values[1:])
        np.testing.assert_array_equal(stored[chosen].scales, stored.scales[1:])

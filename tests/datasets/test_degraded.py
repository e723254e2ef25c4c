"""toyhorse-degraded: the pictures of toyhorse, spoilt, with everything else as it is."""

from __future__ import annotations

import hashlib

import numpy as np

from featstore.datasets import resolve
from featstore.heads.splits import splits


def test_only_the_pixels_differ():
    clean, spoilt = resolve("toyhorse"), resolve("toyhorse-degraded")
    assert spoilt.info.name == "toyhorse-degraded"
    assert (spoilt.info.classes, spoilt.info.prompt) == (clean.info.classes, clean.info.prompt)
    assert [one.key for one in spoilt.samples] == [one.key for one in clean.samples]
    assert not {one.digest for one in spoilt.samples} & {one.digest for one in clean.samples}
    for key in ("train-000", "test-050"):
        np.testing.assert_array_equal(spoilt.mask(key), clean.mask(key))
        np.testing.assert_array_equal(spoilt.keypoints(key).xy_px, clean.keypoints(key).xy_px)
        assert spoilt.image_label(key) == clean.image_label(key)
        assert spoilt.caption(key, "fine") == clean.caption(key, "fine")
    both = (splits(3, [one.split for one in data.samples]) for data in (clean, spoilt))
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one[0], other[0])


def test_pictures_are_spoilt_a_lot_and_the_same_each_time():
    clean, spoilt, again = resolve("toyhorse"), resolve("toyhorse-degraded"), resolve("toyhorse-degraded")
    worst = []
    for sample in spoilt.samples[60:80]:
        one = spoilt.image(sample.key)
        np.testing.assert_array_equal(one, again.image(sample.key))
        assert sample.digest == hashlib.sha256(one.tobytes()).hexdigest()
        error = np.mean((one.astype(float) - clean.image(sample.key)) ** 2)
        worst.append(10 * np.log10(255**2 / error))
    assert 15 < np.mean(worst) < 25  # dB; 30 would hardly be seen

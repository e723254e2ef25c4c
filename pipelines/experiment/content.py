"""The content-shift score of features that are in a store; see `featstore.content_shift`."""

from __future__ import annotations

import numpy as np

from featstore.content_shift import score, shift, telling_layers
from featstore.errors import NotCommittedError
from featstore.pipelines.reading import BucketConfig, open_bucket

_IMAGES_A_READ = 64


def content_score(
    run: BucketConfig,
    reference: BucketConfig,
    anchor: BucketConfig,
    *,
    origin: BucketConfig | None = None,
    pattern: bool = False,
) -> float:
    """Mean score over images and convolutional layers whose maps are large enough.

    Args:
        run: of the features that are judged; one run, as the two others.
        reference: of the features at t = 0.
        anchor: of features with stronger shift.
        origin: what the judged features' own shift is counted from; None: ``reference``.
        pattern: score patterns in place of the paper's ``diff``.

    Raises:
        NotCommittedError: if these have no image in common.
        BadRequestError: if the anchor has no shift.
    """
    buckets = [open_bucket(one) for one in (run, reference, anchor, origin or reference)]
    rows = np.flatnonzero(np.logical_and.reduce([one.complete() for one in buckets]))
    if not len(rows):
        raise NotCommittedError(
            f"no image has features of {run.techniques!r}, of the reference and of the anchor",
            hint=f"run: {buckets[0].extract_command(run)}",
        )
    judged, first, far, begin = (one.runs[0] for one in buckets)
    sums = 0.0
    layers = telling_layers({name: judged.layers[name].shape for name in buckets[0].maps})
    for layer in layers:
        for start in range(0, len(rows), _IMAGES_A_READ):
            chosen = rows[start : start + _IMAGES_A_READ]
            maps, zero, most, own = (one.numpy(layer, chosen) for one in (judged, first, far, begin))
            sums += float(score(shift(own, maps, pattern=pattern), shift(zero, most, pattern=pattern)).sum())
    return sums / (len(rows) * len(layers))

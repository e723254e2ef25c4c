"""A correspondence problem whose answer lies in one of the runs: each named point has a code of its own."""

import itertools

import dask.array as da
import numpy as np

from featstore.heads import Beside, Features, RunRef
from featstore.heads.correspondence_task import CorrespondenceTask, ImagePoints

IMAGES, SIDE, NAMES = 20, 8, ("nose", "eye", "left hoof", "right hoof", "tail")
SIZE_PX = (40, 80)
TRAIN, TEST = range(12), range(12, IMAGES)


def points(seed=0):
    """Row to points, at the centres of cells of the fine layer that do not touch; one point of each image is hidden."""
    rng = np.random.default_rng(seed)
    out = {}
    for row in range(IMAGES):
        cells = rng.choice((SIDE // 2) ** 2, len(NAMES), replace=False)
        xy = np.stack([cells % (SIDE // 2) * 2 + 0.5, cells // (SIDE // 2) * 2 + 0.5], 1) / SIDE
        visible = np.ones(len(NAMES), bool)
        visible[row % len(NAMES)] = False
        category = "horse" if row % 2 else "cow"
        out[row] = ImagePoints(
            names=NAMES,
            xy=xy.astype(np.float32),
            visible=visible,
            size_px=SIZE_PX,
            box_px=(10, 5, 60, 35),
            category=category,
        )
    return out


def maps(where, *, signal, seed, beside_it=False, noise=0.3, dtype=np.float16):
    """The fine layer holds each point's code at its cell; the coarse one holds noise.

    ``beside_it``: all points have one code, and their own codes lie in the cells to the right of them.
    """
    rng = np.random.default_rng(seed)
    fine = noise * rng.standard_normal((IMAGES, 6, SIDE, SIDE))
    codes = np.linalg.qr(np.random.default_rng(7).standard_normal((6, 6)))[0]
    if signal:
        for row, known in where.items():
            cells = (known.xy * SIDE).astype(int)
            for number, (x, y) in enumerate(cells.tolist()):
                fine[row, :, y, x + beside_it] += 3 * codes[number]
                fine[row, :, y, x] += 3 * beside_it * codes[-1]
    coarse = 0.1 * rng.standard_normal((IMAGES, 2, 4, 4))
    values = {"coarse": coarse, "fine.map": fine}
    # another offset and scale in every run: no head may depend on them
    return {name: (value * (seed + 1) + 3 * seed).astype(dtype) for name, value in values.items()}


def lazy(layers, block=6):
    return {name: da.from_array(v, chunks=(block, *v.shape[1:])) for name, v in layers.items()}


def pairs(rows, where):
    return np.array(
        [p for p in itertools.permutations(rows, 2) if where[p[0]].category == where[p[1]].category], np.int64
    ).reshape(-1, 2)


def task(*, signal_runs=(0,), count=1, beside_it=False, noise=0.3, beside=False, dtype=np.float16, **changes):
    where = points()
    bucket = [
        lazy(maps(where, signal=k in signal_runs, seed=k, beside_it=beside_it, noise=noise, dtype=dtype))
        for k in range(count)
    ]
    runs = [RunRef(name=f"pass {k}", fingerprint=str(k) * 64) for k in range(count)]
    extra = np.random.default_rng(9).standard_normal((IMAGES, 3, 4, 4)).astype(dtype)
    values = {
        "features": Features(
            maps=bucket, runs=runs, beside=[Beside(run=runs[0], layers=lazy({"attn": extra}))] if beside else []
        ),
        "points": where,
        "train_pairs": pairs(TRAIN, where),
        "test_pairs": pairs(TEST, where),
    }
    return CorrespondenceTask(**{**values, **changes})

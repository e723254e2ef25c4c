"""A segmentation problem whose answer lies in one of three runs."""

import dask.array as da
import numpy as np

from featstore.heads import Beside, Features, RunRef, SegmentationTask

IMAGES, SIDE, CLASSES = 30, 16, ("ground", "body", "leg", "eye")
LAYERS = {"coarse": (6, 4, 4), "fine": (5, 8, 8)}
ATTENTION = {"attn": (3, 4, 4)}
SIGNAL_RUN = 1


def masks(seed=0):
    """(N, 16, 16) uint8 made of 4 x 4 squares, so that even the coarse layer can tell them apart."""
    squares = np.random.default_rng(seed).integers(0, len(CLASSES), (IMAGES, 4, 4))
    return np.kron(squares, np.ones((1, 4, 4))).astype(np.uint8)


def maps(labels, *, signal, seed, noise=0.5, dtype=np.float16):
    rng = np.random.default_rng(seed)
    out = {}
    for name, (channels, height, width) in LAYERS.items():
        values = rng.standard_normal((IMAGES, channels, height, width))
        if signal:
            code = 1.5 * rng.standard_normal((len(CLASSES), channels))
            step = SIDE // height
            values = noise * values + code[labels[:, ::step, ::step]].transpose(0, 3, 1, 2)
        # another offset and scale in every run: no head may depend on them
        out[name] = (values * (seed + 1) + 3 * seed).astype(dtype)
    return out


def lazy(layers, block=7):
    return {name: da.from_array(v, chunks=(block, *v.shape[1:])) for name, v in layers.items()}


def task(*, signal_runs=(SIGNAL_RUN,), count=3, attention=True, dtype=np.float16, **changes):
    labels = masks()
    bucket = [lazy(maps(labels, signal=k in signal_runs, seed=k, dtype=dtype)) for k in range(count)]
    noise = np.random.default_rng(99)
    attended = {n: noise.standard_normal((IMAGES, *s)).astype(dtype) for n, s in ATTENTION.items()}
    beside = attention if isinstance(attention, dict) else lazy(attended) if attention else {}
    runs = [RunRef(name=f"pass {k}", fingerprint=str(k) * 64) for k in range(count)]
    features = Features(
        maps=changes.pop("maps", bucket),
        runs=changes.pop("runs", runs),
        beside=[Beside(run=runs[0], layers=beside)] if beside else [],
    )
    values = {
        "features": features,
        "masks": labels,
        "train_rows": range(12),
        "test_rows": range(14, IMAGES),
        "classes": CLASSES,
    }
    return SegmentationTask(**{**values, **changes})

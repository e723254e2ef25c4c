"""What is trained on top of stored features.

Heads take lazy arrays and nothing else, so they train unchanged on any ``dask.array`` of the right
shape. Names load on first use: importing this package imports neither torch nor dask.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featstore.heads.base import Head
    from featstore.heads.features import Beside, BesideSpec, Features, FeaturesSpec, RunRef
    from featstore.heads.files import load_head, read_head_json, save_head
    from featstore.heads.head import PixelHead, PixelSpec, Prediction
    from featstore.heads.pixels import PixelHeadConfig
    from featstore.heads.segmentation import SegmentationResult, predict_rows, train_segmentation
    from featstore.heads.task import SegmentationTask

_HOMES = {
    "Beside": "features",
    "BesideSpec": "features",
    "Features": "features",
    "FeaturesSpec": "features",
    "Head": "base",
    "PixelHead": "head",
    "PixelHeadConfig": "pixels",
    "PixelSpec": "head",
    "Prediction": "head",
    "RunRef": "features",
    "SegmentationResult": "segmentation",
    "SegmentationTask": "task",
    "load_head": "files",
    "predict_rows": "segmentation",
    "read_head_json": "files",
    "save_head": "files",
    "train_segmentation": "segmentation",
}

__all__ = [
    "Beside",
    "BesideSpec",
    "Features",
    "FeaturesSpec",
    "Head",
    "PixelHead",
    "PixelHeadConfig",
    "PixelSpec",
    "Prediction",
    "RunRef",
    "SegmentationResult",
    "SegmentationTask",
    "load_head",
    "predict_rows",
    "read_head_json",
    "save_head",
    "train_segmentation",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"featstore.heads.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

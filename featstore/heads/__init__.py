"""What is trained on top of stored features.

Heads take lazy arrays and nothing else, so they train unchanged on any ``dask.array`` of the right
shape. Names load on first use: importing this package imports neither torch nor dask.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featstore.heads.base import Head
    from featstore.heads.classification import ClassificationConfig, ClassificationHead, ClassPrediction
    from featstore.heads.classification_task import ClassificationTask
    from featstore.heads.classification_training import (
        ClassificationResult,
        score_classification,
        train_classification,
    )
    from featstore.heads.correspondence import CorrespondenceHead, Matches, match
    from featstore.heads.correspondence_net import CorrespondenceConfig
    from featstore.heads.correspondence_scoring import score_correspondence
    from featstore.heads.correspondence_task import CorrespondenceTask, ImagePoints
    from featstore.heads.correspondence_training import CorrespondenceResult, train_correspondence
    from featstore.heads.features import Beside, BesideSpec, Features, FeaturesSpec, RunRef
    from featstore.heads.files import load_head, read_head_json, save_head
    from featstore.heads.head import PixelHead, PixelSpec, Prediction
    from featstore.heads.pixels import PixelHeadConfig
    from featstore.heads.segmentation import SegmentationResult, predict_rows, train_segmentation
    from featstore.heads.semantic import SemanticResult, train_semantic
    from featstore.heads.task import SegmentationTask
    from featstore.heads.upernet import MapPrediction, UPerNetHead, UPerNetHeadConfig

_HOMES = {
    "Beside": "features",
    "BesideSpec": "features",
    "ClassPrediction": "classification",
    "ClassificationConfig": "classification",
    "ClassificationHead": "classification",
    "ClassificationResult": "classification_training",
    "ClassificationTask": "classification_task",
    "CorrespondenceConfig": "correspondence_net",
    "CorrespondenceHead": "correspondence",
    "CorrespondenceResult": "correspondence_training",
    "CorrespondenceTask": "correspondence_task",
    "Features": "features",
    "FeaturesSpec": "features",
    "Head": "base",
    "ImagePoints": "correspondence_task",
    "MapPrediction": "upernet",
    "Matches": "correspondence",
    "PixelHead": "head",
    "PixelHeadConfig": "pixels",
    "PixelSpec": "head",
    "Prediction": "head",
    "RunRef": "features",
    "SegmentationResult": "segmentation",
    "SegmentationTask": "task",
    "SemanticResult": "semantic",
    "UPerNetHead": "upernet",
    "UPerNetHeadConfig": "upernet",
    "load_head": "files",
    "match": "correspondence",
    "predict_rows": "segmentation",
    "read_head_json": "files",
    "save_head": "files",
    "score_classification": "classification_training",
    "score_correspondence": "correspondence_scoring",
    "train_classification": "classification_training",
    "train_correspondence": "correspondence_training",
    "train_segmentation": "segmentation",
    "train_semantic": "semantic",
}

__all__ = [
    "Beside",
    "BesideSpec",
    "ClassPrediction",
    "ClassificationConfig",
    "ClassificationHead",
    "ClassificationResult",
    "ClassificationTask",
    "CorrespondenceConfig",
    "CorrespondenceHead",
    "CorrespondenceResult",
    "CorrespondenceTask",
    "Features",
    "FeaturesSpec",
    "Head",
    "ImagePoints",
    "MapPrediction",
    "Matches",
    "PixelHead",
    "PixelHeadConfig",
    "PixelSpec",
    "Prediction",
    "RunRef",
    "SegmentationResult",
    "SegmentationTask",
    "SemanticResult",
    "UPerNetHead",
    "UPerNetHeadConfig",
    "load_head",
    "match",
    "predict_rows",
    "read_head_json",
    "save_head",
    "score_classification",
    "score_correspondence",
    "train_classification",
    "train_correspondence",
    "train_segmentation",
    "train_semantic",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"featstore.heads.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

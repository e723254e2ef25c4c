"""Head files: a folder with ``head.json`` and ``head.safetensors``, both with digests.

``head.json`` holds the format, the kind of head, its features (layers, recipe fingerprints of the runs),
facts (classes, sizes), the configuration, the metrics, package versions, the digest of the weights, and
its own digest.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import featstore
from featstore.errors import CorruptError, FeatstoreError, IncompatibleError, NotFoundError, StorageError
from featstore.heads.base import KINDS, Head, head_class
from featstore.heads.features import FeaturesSpec
from featstore.recipe import canonical_json, sha256_hex
from featstore.whole_file import write_whole

FORMAT = 2
"""Version of the layout of a head file."""

_JSON = "head.json"
_WEIGHTS = "head.safetensors"


def save_head(
    folder: str | Path,
    head: Head,
    *,
    metrics: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a head; what was in the folder's two files is replaced.

    The weights are written first, and ``head.json``, which names their digest, last: a crash leaves
    the old head, or a pair that `load_head` recognises as damaged, never a mixture that loads.

    Args:
        folder: made if it is not there.
        head: the head.
        metrics: plain JSON, returned by `read_head_json`.
        extra: further plain JSON, such as data set, store and techniques.

    Returns:
        The folder.

    Raises:
        StorageError: if the folder cannot be written.
        ValueError: for metrics with NaN or infinities.
    """
    folder = Path(folder)
    weights = save_tensors({name: value.detach().cpu().contiguous() for name, value in head.tensors().items()})
    document = {
        "featstore_head": FORMAT,
        "kind": head.kind,
        "features": head.features.to_json(),
        "facts": head.facts,
        "config": dataclasses.asdict(head.config),
        "metrics": dict(metrics or {}),
        "extra": dict(extra or {}),
        "versions": {
            "featstore": featstore.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "weights_sha256": sha256_hex(weights),
    }
    document["sha256"] = sha256_hex(canonical_json(document))
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _WEIGHTS, weights)
        write_whole(folder / _JSON, text)
    except OSError as error:
        raise StorageError(f"cannot write the head to {folder}: {error}", hint="check space and permissions") from error
    return folder


def read_head_json(folder: str | Path) -> dict[str, Any]:
    """The checked ``head.json`` of a head, without loading its weights.

    Raises:
        NotFoundError: if the folder holds no head.
        CorruptError: if the file is damaged.
        IncompatibleError: if it is of a newer format.
    """
    path = Path(folder) / _JSON
    hint = "train the head again with `featstore train-head`"
    try:
        document = json.loads(_read(path))
    except ValueError as error:
        raise CorruptError(f"{path} is no JSON: {error}", hint=hint) from error
    if not isinstance(document, dict) or not isinstance(document.get("featstore_head"), int):
        raise CorruptError(f"{path} describes no head", hint=hint)
    # The format before the digest: a newer one may well digest differently.
    if document["featstore_head"] != FORMAT or document.get("kind") not in KINDS:
        raise IncompatibleError(
            f"{path} is a {document.get('kind')!r} head of format {document['featstore_head']}; "
            f"this version reads {', '.join(KINDS)} heads of format {FORMAT}",
            hint="upgrade featstore" if document["featstore_head"] >= FORMAT else hint,
        )
    digest = document.pop("sha256", None)
    if sha256_hex(canonical_json(document)) != digest:
        raise CorruptError(f"{path} does not match its digest", hint=hint)
    return document


def load_head(folder: str | Path, *, device: torch.device | str = "cpu") -> Head:
    """The head that `save_head` wrote; it predicts bit for bit the same on the same device.

    Raises:
        NotFoundError: if the folder holds no head.
        CorruptError: if one of the files is damaged.
        IncompatibleError: if it is of a newer format.
    """
    document = read_head_json(folder)
    path = Path(folder) / _WEIGHTS
    data = _read(path)
    if sha256_hex(data) != document["weights_sha256"]:
        raise CorruptError(
            f"{path} does not match the digest in {_JSON}", hint="train the head again with `featstore train-head`"
        )
    try:
        return _build(document, load_tensors(data)).to(device)
    except (FeatstoreError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        # both digests hold, so this was written so: by code that this version does not know
        raise IncompatibleError(f"the head in {folder} cannot be used: {error}", hint="upgrade featstore") from error


def _build(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Head:
    head = head_class(document["kind"])
    built = head.build(FeaturesSpec.from_json(document["features"]), document["facts"], document["config"])
    built.load(tensors)
    return built


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(
            f"no head at {path.parent}: {path.name} is missing", hint="name the folder that train-head wrote"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from error

"""Where LoRAs that users trained lie, and what is noted beside them. No torch.

A trained LoRA is a folder ``<weights root>/<model>/loras/<data set>[/<variant>]`` with the weights and, beside them,
a JSON file that says what they were trained on. The technique ``lora`` finds it by the names of model and data set.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from featstore.errors import BadRequestError, FeatstoreError
from featstore.models.files import read_json
from featstore.models.weights_root import DEFAULT_ROOT, asked_root

LORA_FILE = "pytorch_lora_weights.safetensors"
"""File name of the weights, as diffusers has it."""
NOTES_FILE = "training.json"
"""File name of what is noted beside the weights."""

_LORAS = "loras"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def has_weights(folder: Path) -> bool:
    """Whether a model's folder holds anything but LoRAs that were trained for it."""
    return folder.is_dir() and any(path.name != _LORAS for path in folder.iterdir())


def trained_lora(model: str, dataset: str, variant: str | None, root: Path | None = None) -> Path:
    """The folder of the LoRA that was, or would be, trained for a data set.

    Args:
        model: public name of the model.
        dataset: name of the data set.
        variant: e.g. ``overfit``; None: the well-trained one.
        root: the weights root; None: ``$FEATSTORE_WEIGHTS``, else ``./weights``.

    Raises:
        BadRequestError: if one of the names is no name of a folder.
    """
    for name in (*model.split("/"), dataset, variant or "x"):
        if not _NAME.fullmatch(name):
            raise BadRequestError(f"{name!r} cannot name a folder of LoRAs: it is not of [A-Za-z0-9._-]")
    folder = (asked_root(root) or DEFAULT_ROOT) / model / _LORAS / dataset
    return folder if variant is None else folder / variant


def find_trained(model: str, dataset: str, variant: str | None, root: Path | None = None) -> Path | None:
    """The folder of the LoRA that was trained for a data set; None if there is none."""
    try:
        folder = trained_lora(model, dataset, variant, root)
    except BadRequestError:
        return None
    return folder if (folder / LORA_FILE).is_file() else None


def trained_variants(model: str, dataset: str, root: Path | None = None) -> tuple[str, ...]:
    """The named variants that were trained for a data set, sorted."""
    try:
        folder = trained_lora(model, dataset, None, root)
    except BadRequestError:
        return ()
    return tuple(sorted(path.parent.name for path in folder.glob(f"*/{LORA_FILE}")))


def read_notes(folder: Path) -> dict[str, Any] | None:
    """What `featstore train-lora` noted beside the LoRA in a folder; None if nothing readable is there."""
    try:
        return read_json(folder / NOTES_FILE, f"LoRA {folder}")
    except FeatstoreError:
        return None


def check_model(folder: Path, *, model: str, weights_digest: str) -> None:
    """Refuse a LoRA found by name that was trained on another model of that name.

    Raises:
        BadRequestError: if the notes beside the LoRA give another digest of the model's weights.
    """
    noted = (read_notes(folder) or {}).get("weights_digest", weights_digest)
    if noted != weights_digest:
        raise BadRequestError(
            f"the LoRA in {folder} was trained on another model that is called {model!r} too "
            f"(weights {str(noted)[:12]}.., here {weights_digest[:12]}..)",
            hint=f"to use it all the same write lora:{folder / LORA_FILE}",
        )

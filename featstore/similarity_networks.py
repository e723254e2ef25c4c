"""How close pictures are to networks' eyes: LPIPS, CLIP and DINO, where their weights lie on this machine.

They are looked for in the folder ``similarity`` of the weights root, and never fetched:

- ``lpips/alexnet.safetensors``: torchvision's AlexNet (Zhang et al., 2018; the weights on top come with torchmetrics);
- ``clip/``: a CLIP vision model with its projection, in transformers' layout (Radford et al., 2021);
- ``dino/``: a DINO or DINOv2 model, in transformers' layout (Caron et al., 2021).

B images, H W height and width in pixels, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import BadRequestError
from featstore.models.weights_root import DEFAULT_ROOT, asked_root

UInt8Array = npt.NDArray[np.uint8]
Float64Array = npt.NDArray[np.float64]
Measure = Callable[[UInt8Array, UInt8Array], Float64Array]
"""Reference and pictures, uint8 (B, H, W, 3), to a value an image (B,)."""

FOLDER = "similarity"
"""Name of the folder in the weights root."""
FILES = {"lpips": "lpips/alexnet.safetensors", "clip": "clip/config.json", "dino": "dino/config.json"}
"""What shows that a measure's weights are there."""
_LPIPS_SIDE_PX = 64


def available(root: Path | None = None) -> tuple[str, ...]:
    """Those of ``lpips``, ``clip`` and ``dino`` whose weights are at hand.

    Args:
        root: the weights root; None: ``$FEATSTORE_WEIGHTS``, else ``./weights``.
    """
    folder = _folder(root)
    return tuple(name for name, file in FILES.items() if (folder / file).is_file())


def load(name: str, device: str = "cpu", root: Path | None = None) -> Measure:
    """The measure of a name that `available` gives: LPIPS' distance (0 for equal pictures), or the cosine of CLIP's or
    DINO's embeddings (1 for equal ones).

    Raises:
        BadRequestError: if its weights are damaged or of another network.
    """  # noqa: D205 - one sentence, two measures
    folder = _folder(root) / FILES[name].partition("/")[0]
    try:
        return _lpips(folder, device) if name == "lpips" else _cosine(name, folder, device)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise BadRequestError(
            f"the weights of {name} in {folder} cannot be loaded: {first}", hint="repair or remove the folder"
        ) from error


def _folder(root: Path | None) -> Path:
    return (asked_root(root) or DEFAULT_ROOT) / FOLDER


def _lpips(folder: Path, device: str) -> Measure:
    import torch
    from safetensors.torch import load_file
    from torchmetrics.functional.image.lpips import _LPIPS

    network = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    stored = load_file(folder / "alexnet.safetensors")
    # torchmetrics has AlexNet in slices, which keep torchvision's numbers.
    wanted = {name: f"features.{name.partition('.')[2]}" for name in network.net.state_dict()}
    network.net.load_state_dict({name: stored[source] for name, source in wanted.items()})
    network.to(device).eval()

    def measure(reference: UInt8Array, pictures: UInt8Array) -> Float64Array:
        with torch.inference_mode():
            a, b = (_signed(images, _LPIPS_SIDE_PX).to(device) for images in (reference, pictures))
            return np.asarray(network(a, b).reshape(len(reference)).cpu(), dtype=np.float64)

    return measure


def _cosine(name: str, folder: Path, device: str) -> Measure:
    import torch
    from transformers import AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

    from featstore.models.quiet import quiet

    kind: Any = CLIPVisionModelWithProjection if name == "clip" else AutoModel
    with quiet():
        network, info = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        prepare = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise BadRequestError(f"the weights of {name} in {folder} lack {missing[0]} and {len(missing) - 1} more")
    network.to(device).eval()

    def embed(images: UInt8Array) -> torch.Tensor:
        pixels = prepare(list(images), return_tensors="pt").pixel_values.to(device)
        seen = network(pixels)
        value: torch.Tensor = seen.image_embeds if name == "clip" else seen.last_hidden_state[:, 0]
        return torch.nn.functional.normalize(value.double(), dim=-1)

    def measure(reference: UInt8Array, pictures: UInt8Array) -> Float64Array:
        with torch.inference_mode():
            return np.asarray((embed(reference) * embed(pictures)).sum(-1).cpu(), dtype=np.float64)

    return measure


def _signed(images: UInt8Array, least_px: int) -> Any:
    """Pixels as torch float32 (B, 3, H, W) in [-1, 1], enlarged where a side is smaller than AlexNet takes."""
    import torch

    values = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if (smallest := min(values.shape[2:])) < least_px:
        values = torch.nn.functional.interpolate(values, scale_factor=least_px / smallest, mode="bilinear")
    return values

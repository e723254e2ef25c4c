"""Networks that see edges, depth, line drawings and poses in images: controlnet-aux, loaded and silenced here only.

controlnet-aux enlarges or shrinks whatever is not a multiple of 64 px. Here it never gets to: a picture is continued
below and to the right by its own last row and column up to such multiples, and what was seen is cut back to the
picture's size, so that every pixel of a condition is where it is in the image. Pictures of such multiples are
not touched, and their conditions are those of controlnet-aux itself.

Shapes: H W height and width of the model's input in pixels.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from featstore.errors import BadRequestError
from featstore.extraction.images import UInt8Array
from featstore.models.quiet import quiet
from featstore.techniques.detectors import CANNY_THRESHOLDS, DetectorRef

See = Callable[[UInt8Array], UInt8Array]
"""One image to its condition, both uint8 (H, W, 3)."""
_MULTIPLE_PX = 64


class Detectors:
    """Detectors on one device, in float32, each loaded once. They see one image at a time.

    Args:
        device: where networks run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._loaded: dict[DetectorRef, See] = {}

    def load(self, ref: DetectorRef) -> None:
        """Load a detector, unless it is loaded.

        Raises:
            BadRequestError: if its weights are damaged, of another network, or hold more than tensors.
        """
        if ref not in self._loaded:
            self._loaded[ref] = _MAKERS[ref.name](ref, self.device)

    def see(self, image: UInt8Array, ref: DetectorRef) -> UInt8Array:
        """The condition of one image, uint8 (H, W, 3), RGB, at exactly the image's size: the same.

        It depends on the image alone; on one kind of device it is the same every time.
        """
        self.load(ref)
        matmul = torch.get_float32_matmul_precision()
        # Detectors are small: full precision costs little, and what the passes run in does not change conditions.
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                return self._loaded[ref](image)
        finally:
            torch.set_float32_matmul_precision(matmul)


def edges(image: UInt8Array) -> UInt8Array:
    """`cv2.Canny` of one image at the size it has: uint8 (H, W, 3), 255 on edges.

    It is what controlnet-aux' `CannyDetector` calls and the method uses; it needs neither weights nor the seconds
    that importing controlnet-aux takes.
    """
    found = cv2.Canny(np.ascontiguousarray(image), *CANNY_THRESHOLDS)
    return np.repeat(np.asarray(found, dtype=np.uint8)[:, :, None], 3, axis=2)


def _canny(ref: DetectorRef, device: torch.device) -> See:
    return edges


def _hed(ref: DetectorRef, device: torch.device) -> See:
    hed = _aux("hed")
    return _at_own_size(hed.HEDdetector(_network(hed.ControlNetHED_Apache2, ref.files[0], device)))


def _lineart(ref: DetectorRef, device: torch.device) -> See:
    lineart = _aux("lineart")
    network = _network(lambda: lineart.Generator(3, 1, 3), ref.files[0], device)
    # The second network is that of its coarse kind, which is not asked for.
    return _at_own_size(lineart.LineartDetector(network, network))


def _openpose(ref: DetectorRef, device: torch.device) -> See:
    pose = _aux("open_pose")
    makers = (
        (pose.Body, _aux("open_pose.model").bodypose_model, True),
        (pose.Hand, _aux("open_pose.model").handpose_model, True),
        (pose.Face, _aux("open_pose.face").FaceNet, False),
    )
    parts = []
    for (kind, network, nested), file in zip(makers, ref.files, strict=False):
        # Their constructors read files in their own way; the network is all that they hold.
        part = kind.__new__(kind)
        part.model = _network(network, file, device, nested=nested)
        parts.append(part)
    whole = len(parts) == len(makers)
    return _at_own_size(pose.OpenposeDetector(*parts), include_hand=whole, include_face=whole)


def _depth(ref: DetectorRef, device: torch.device) -> See:
    if ref.folder is not None:
        return _transformers_depth(ref.folder, device)
    midas = _aux("midas.midas.dpt_depth")
    network = _network(lambda: midas.DPTDepthModel(backbone="vitb_rn50_384", non_negative=True), ref.files[0], device)

    def see(image: UInt8Array) -> UInt8Array:
        height, width = image.shape[:2]
        pixels = torch.from_numpy(_padded(image)).to(device, torch.float32) / 127.5 - 1.0
        return _shades(network(pixels.permute(2, 0, 1)[None])[0, :height, :width])

    return see


def _transformers_depth(folder: Path, device: torch.device) -> See:
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    with quiet(), _errors_about(folder):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        network, info = AutoModelForDepthEstimation.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    if info["missing_keys"]:
        # transformers would leave them random and only say so.
        raise BadRequestError(f"{folder} lacks {len(info['missing_keys'])} tensors of its depth network")
    network.to(device).eval().requires_grad_(False)

    def see(image: UInt8Array) -> UInt8Array:
        inputs = processor(images=np.ascontiguousarray(image), return_tensors="pt").to(device)
        sizes = [tuple(image.shape[:2])]
        (result,) = processor.post_process_depth_estimation(network(**inputs), target_sizes=sizes)
        return _shades(result["predicted_depth"])

    return see


_MAKERS: dict[str, Callable[[DetectorRef, torch.device], See]] = {
    "canny": _canny,
    "depth": _depth,
    "hed": _hed,
    "lineart": _lineart,
    "openpose": _openpose,
    "openpose-full": _openpose,
}


def _shades(depth: torch.Tensor) -> UInt8Array:
    """Depth (H, W), any range, as controlnet-aux draws it: uint8 (H, W, 3), 255 at the nearest; 0 where all is flat."""
    lowest = depth.min()
    shades = (depth - lowest) / (depth.max() - lowest).clamp_min(torch.finfo(depth.dtype).tiny)
    grey = (shades.cpu().numpy() * 255.0).clip(0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _at_own_size(detector: Callable[..., Any], **options: Any) -> See:
    """A detector of controlnet-aux, kept from resizing."""

    def see(image: UInt8Array) -> UInt8Array:
        height, width = image.shape[:2]
        padded = _padded(image)
        side = min(padded.shape[:2])
        found = detector(padded, detect_resolution=side, image_resolution=side, output_type="np", **options)
        return np.ascontiguousarray(found[:height, :width], dtype=np.uint8)

    return see


def _padded(image: UInt8Array) -> UInt8Array:
    """The image, its last row and column repeated up to sides that controlnet-aux keeps."""
    below, right = (-side % _MULTIPLE_PX for side in image.shape[:2])
    return np.pad(image, ((0, below), (0, right), (0, 0)), mode="edge")


def _aux(module: str) -> Any:
    """A module of controlnet-aux, imported in silence: it warns of things that it is not used for here."""
    before = os.environ.get("KMP_DUPLICATE_LIB_OK")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(f"controlnet_aux.{module}")
        finally:
            # It is set on import, for a fault of other people's installations, and would hide one of this.
            os.environ.pop("KMP_DUPLICATE_LIB_OK", None)
            if before is not None:
                os.environ["KMP_DUPLICATE_LIB_OK"] = before


def _network(make: Callable[[], nn.Module], file: Path, device: torch.device, *, nested: bool = False) -> nn.Module:
    """A network with the weights in a file, frozen, in float32 on the device.

    Args:
        make: makes it.
        file: ``.safetensors``, or a pickle of which tensors and nothing else are read.
        device: where it goes.
        nested: whether the file lacks the first level of the network's names.

    Raises:
        BadRequestError: if the file is damaged, or of another network.
    """
    with _errors_about(file):
        state = _tensors(file)
        # The memory of random weights would only be thrown away.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = make()
        if nested:
            state = {name: state[name.partition(".")[2]] for name in network.state_dict()}
        network.load_state_dict(state, strict=True, assign=True)
        return network.to(device).eval().requires_grad_(False)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".safetensors":
        state: Any = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    # Some checkpoints of MiDaS keep the state of their training beside the network.
    state = state["model"] if "optimizer" in state else state
    tensors = {name: value.float().contiguous() for name, value in state.items()}
    for name, value in tensors.items():
        if not torch.isfinite(value.sum()):
            raise BadRequestError(f"the weights of a detector in {file} hold NaN or infinity ({name})")
    return tensors


@contextlib.contextmanager
def _errors_about(place: Path) -> Iterator[None]:
    """Turn the many ways in which weights fail to load into one error that names the place."""
    try:
        yield
    except BadRequestError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise BadRequestError(
            f"the weights of a detector in {place} cannot be loaded: {type(error).__name__}: "
            f"{lines[0] if lines else 'no message'}",
            hint="download them again",
        ) from error

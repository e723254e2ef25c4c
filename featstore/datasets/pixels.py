"""Image and mask files to arrays, whatever kind of file it is, and their sizes without decoding.

Images come as uint8 (H, W, 3) RGB in 0..255: turned upright by EXIF, transparency laid over white,
16-bit grey scaled from 0..65535, first frame of several. Colour profiles are not applied.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from featstore.datasets.base import IGNORE_LABEL, UInt8Array, UnreadableImageError
from featstore.errors import BadRequestError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes (lower case) of what is taken for an image."""
MAX_PIXELS = 89_478_485
"""Largest image that is decoded (Pillow's own bound for a suspected decompression bomb)."""

# Pillow decides by content, not by suffix. Formats that start other programs (EPS) are not among these.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_ORIENTATION_TAG = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = frozenset({5, 6, 7, 8})
_LABEL_MODES = frozenset({"1", "L", "P", "I", "I;16", "I;16L", "I;16B"})


def _reason(error: Exception) -> str:
    """What went wrong while a file was decoded, in a few words without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known kind, or damaged at its beginning"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001 - a damaged EXIF block may raise anything, and the pixels are fine
        return 1


def _check_size(image: Image.Image) -> None:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise UnreadableImageError(f"{image.width} x {image.height} px are more than the {MAX_PIXELS:,} allowed")


def read_image(path: Path) -> UInt8Array:
    """The image in a file: uint8 (H, W, 3) RGB, upright.

    Raises:
        UnreadableImageError: if there is none, it is truncated, too large or of a kind without a
            meaning as RGB; the message is the reason.
    """
    return _read_rgb(path, str(path))


def decode_image(data: bytes, name: str) -> UInt8Array:
    """The image in the bytes of a file, as `read_image` gives it; messages call it ``name``."""
    return _read_rgb(io.BytesIO(data), name)


def _read_rgb(source: Path | io.BytesIO, name: str) -> UInt8Array:
    try:
        with Image.open(source, formats=_FORMATS) as image:
            _check_size(image)
            image.load()
            transposition = _TRANSPOSITIONS.get(_orientation(image))
            rgb = _to_rgb(image if transposition is None else image.transpose(transposition))
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{name}: {error}") from None
    except Exception as error:  # damaged files make decoders raise anything
        raise UnreadableImageError(f"{name}: {_reason(error)}") from error
    return rgb


def _to_rgb(image: Image.Image) -> UInt8Array:
    if image.mode.startswith("I") or image.mode == "F":
        grey = _deep_grey(image)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), layer)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _deep_grey(image: Image.Image) -> UInt8Array:
    """Grey of more than 8 bits as uint8 (H, W): integers are 0..65535, floats 0..1, nothing is guessed."""
    values = np.asarray(image).astype(np.float64)
    top, unit = (1.0, "0..1") if image.mode == "F" else (65535.0, "0..65535")
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
        raise UnreadableImageError(f"grey values outside {unit}, which have no meaning as RGB")
    return np.rint(values * (255.0 / top)).astype(np.uint8)


def image_size(path: Path) -> tuple[int, int] | None:
    """(height, width) in pixels of an image as `read_image` gives it, from its header; None if it has none."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            if image.format == "TIFF":  # whether `size` is that of the upright image depends on Pillow's version
                width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT]
            # Pillow would decode a whole PNG in search of an EXIF block behind the pixels.
            has_exif = image.format != "PNG" or "exif" in image.info
            return (width, height) if has_exif and _orientation(image) in _SWAPS_SIDES else (height, width)
    except Exception:  # noqa: BLE001 - damaged files make decoders raise anything; `read_image` says what
        return None


def mask_size(path: Path) -> tuple[int, int]:
    """(height, width) of a mask, from its header.

    Raises:
        BadRequestError: if the header says that these cannot be labels: colours, fractions, three axes.
    """
    if path.suffix.lower() == ".npy":
        array = _open_npy(path)
        if array.ndim != 2 or array.dtype.kind not in "uib":
            raise BadRequestError(
                f"mask {path}: shape {array.shape} of {array.dtype}; labels are integers of shape (height, width)",
                hint="save class indices 0..254, 255 for `no label`",
            )
        return int(array.shape[0]), int(array.shape[1])
    try:
        with Image.open(path, formats=_FORMATS) as image:
            mode, height, width = image.mode, image.height, image.width
    except Exception as error:  # damaged files make decoders raise anything
        raise BadRequestError(f"mask {path}: {_reason(error)}", hint="replace or remove the mask") from error
    if mode not in _LABEL_MODES:
        raise BadRequestError(
            f"mask {path} holds colours (mode {mode}), not labels",
            hint="save class indices as a grey or palette PNG or as .npy",
        )
    return height, width


def read_mask(path: Path) -> UInt8Array:
    """The labels in a file: uint8 (H, W); 255, and -1 in signed arrays, mean "no label".

    Raises:
        UnreadableImageError: if the file is damaged or labels lie outside 0..255.
    """
    try:
        values = np.array(_open_npy(path)) if path.suffix.lower() == ".npy" else _read_labels(path)
    except BadRequestError as error:
        raise UnreadableImageError(str(error), hint=error.hint) from error
    except Exception as error:  # damaged files make decoders raise anything
        raise UnreadableImageError(f"mask {path}: {_reason(error)}") from error
    return _as_labels(values, str(path))


def decode_mask(data: bytes, name: str) -> UInt8Array:
    """The labels in the bytes of an image file, as `read_mask` gives them; messages call it ``name``."""
    try:
        values = _read_labels(io.BytesIO(data))
    except Exception as error:  # damaged files make decoders raise anything
        raise UnreadableImageError(f"mask {name}: {_reason(error)}") from error
    return _as_labels(values, name)


def _read_labels(source: Path | io.BytesIO) -> npt.NDArray[np.generic]:
    with Image.open(source, formats=_FORMATS) as image:
        return np.array(image)


def _as_labels(values: npt.NDArray[Any], name: str) -> UInt8Array:
    if values.dtype.kind == "i":
        values = np.where(values == -1, IGNORE_LABEL, values)
    if values.ndim != 2 or values.dtype.kind not in "uib":
        raise UnreadableImageError(f"mask {name}: shape {values.shape} of {values.dtype} are no labels")
    if values.size and (values.min() < 0 or values.max() > 255):
        raise UnreadableImageError(f"mask {name}: labels {values.min()}..{values.max()} outside 0..255")
    return values.astype(np.uint8)


def _open_npy(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """The array in a .npy file, mapped, not read."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadRequestError(f"mask {path}: {_reason(error)}", hint="replace or remove the mask") from error
    if not isinstance(array, np.ndarray):
        raise BadRequestError(f"mask {path}: an archive of arrays, not one array", hint="save it with numpy.save")
    return array

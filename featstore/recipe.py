"""What decides a feature's bytes, and the fingerprint that names it.

A recipe holds everything but the image. Two runs with equal fingerprints hold interchangeable
bytes; whatever cannot be put into a recipe (weights without a digest, say) is refused before it.
Layers are not part of it: asking for more layers later adds arrays to the same run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Self

from featstore.errors import BadRequestError, CorruptError, IncompatibleError

MEANING = 3
"""Version of what the extraction code computes; raised whenever the same request gives other bytes.

2: LoRAs are folded into the weights that they touch, no longer added to what those give.
"""

IMPORTED = "imported"
"""Scheduler of runs whose features other code computed: nobody here knows how latents were noised."""
IMPORTED_MEANING = 0
"""Meaning of such runs."""

TRAIN_TIMESTEPS = 1000
PRECISIONS = ("float16", "float32", "int8")
COMPUTE_DTYPES = ("float32", "float16", "bfloat16")
RESAMPLINGS = ("bicubic",)

_SLUG_MAX_CHARS = 60


def canonical_json(value: object) -> bytes:
    """The one JSON encoding of ``value`` that digests are taken of: sorted keys, no spaces, UTF-8.

    Raises:
        ValueError: for NaN and infinities, which JSON does not have.
        TypeError: for what JSON cannot hold.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def pca_of(components: int, sample: str) -> dict[str, Any]:
    """What `Recipe.reduce` says of a projection onto principal components.

    Args:
        components: N, 1 or more.
        sample: SHA-256 (hex) over the digests of the images that it was fitted on.

    Raises:
        BadRequestError: for values that cannot be.
    """
    if components < 1 or re.fullmatch(r"[0-9a-f]{64}", sample) is None:
        raise BadRequestError(f"a PCA of {components} components, fitted on {sample!r}, cannot be")
    return {"method": "pca", "components": components, "sample": sample}


def sha256_hex(data: bytes) -> str:
    """SHA-256 of ``data`` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def slug(expression: str) -> str:
    """A technique expression made fit for a path: outside ``[a-z0-9.-]`` becomes ``_``.

    Local paths become their file stems and 60 characters at most are kept: it is for people's
    eyes, the digest beside it is what tells runs apart.
    """
    parts = []
    for part in expression.split("+"):
        name, colon, variant = part.partition(":")
        if "/" in variant:
            variant = re.sub(r"\.(safetensors|ckpt|pt|bin)(?=@|$)", "", variant.rstrip("/").rsplit("/", 1)[-1])
        parts.append(name + colon + variant)
    return re.sub(r"[^a-z0-9.-]", "_", "+".join(parts).lower())[:_SLUG_MAX_CHARS]


_JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "int | None": (int, type(None)),
    "Mapping[str, Any]": (dict,),
    "Mapping[str, Any] | None": (dict, type(None)),
}
"""What JSON has in the place of a field, by the field's annotation."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything but the image that decides a feature's bytes."""

    model: str
    """Public name of the model, e.g. ``reference``; a name in a store's paths."""
    weights_digest: str
    """SHA-256 (hex) over the model's configuration and weight files."""
    technique: str
    """Canonical technique expression of the pass, e.g. ``controlnet:canny+lora``."""
    parameters: Mapping[str, Any]
    """What the technique resolved to: prompt text, ControlNet and LoRA digests, scales (plain JSON)."""
    timestep: int
    """What the UNet is fed, 0..999."""
    denoise_from: int | None = None
    """Timestep at which a short denoising down to ``timestep`` starts; None: one noised pass."""
    scheduler: str = "ddpm-forward"
    """How latents are noised; ``ddpm-forward`` is sqrt(a_t) x + sqrt(1 - a_t) noise with the model's own betas."""
    seed: int = 0
    """Seed that the noise of every image is derived from, together with the image's digest and timestep."""
    noise_ensemble: int = 1
    """Number of noise draws that are averaged."""
    height_px: int
    """Height of the model's input."""
    width_px: int
    """Width of the model's input."""
    resampling: str = "bicubic"
    """Filter with which images are resized to the model's input (Pillow's, antialiased)."""
    compute_dtype: str = "float32"
    """Element type of the forward pass."""
    precision: str = "float16"
    """Element type on disk."""
    reduce: Mapping[str, Any] | None = None
    """What channels are projected onto, as `pca_of` says; None: layers are kept whole."""
    meaning: int = MEANING
    """Version of the extraction code's meaning."""

    def __post_init__(self) -> None:
        """Refuse values that no run can have."""
        if not 0 <= self.timestep < TRAIN_TIMESTEPS:
            raise BadRequestError(f"timestep {self.timestep} is outside 0..{TRAIN_TIMESTEPS - 1}")
        for field, allowed in (
            ("precision", PRECISIONS),
            ("compute_dtype", COMPUTE_DTYPES),
            ("resampling", RESAMPLINGS),
        ):
            if getattr(self, field) not in allowed:
                raise BadRequestError(f"{field} {getattr(self, field)!r} is not one of {', '.join(allowed)}")
        if not re.fullmatch(r"[0-9a-f]{64}", self.weights_digest):
            raise BadRequestError(f"weights digest {self.weights_digest!r} is not a SHA-256")
        if self.reduce is not None and self.reduce != pca_of(self.components, str(self.reduce.get("sample"))):
            raise BadRequestError(f"reduce {dict(self.reduce)!r} is no PCA of a sample")
        canonical_json(self.to_json())

    @property
    def components(self) -> int:
        """N, channels of a layer that is reduced; 0 if none is, or if ``reduce`` says no sound number."""
        number = (self.reduce or {}).get("components")
        return number if isinstance(number, int) and number > 0 else 0

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON; `from_json` is its inverse."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The recipe that `to_json` described.

        Raises:
            IncompatibleError: if fields are missing or unknown, as in a store of another version.
            CorruptError: if a field is of another type than it can be.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if set(value) != names:
            odd = ", ".join(sorted(set(value) ^ names))
            raise IncompatibleError(f"a recipe with other fields than this version's: {odd}", hint="upgrade featstore")
        for field in dataclasses.fields(cls):
            if type(value[field.name]) not in _JSON_TYPES[str(field.type)]:
                raise CorruptError(f"a recipe's {field.name} cannot be {value[field.name]!r:.100}")
        return cls(**value)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON of the whole recipe."""
        return sha256_hex(canonical_json(self.to_json()))

    @property
    def family_digest(self) -> str:
        """First 8 hex digits of the digest of the recipe without its timestep; part of the path."""
        value = self.to_json()
        del value["timestep"]
        return sha256_hex(canonical_json(value))[:8]

    @property
    def path(self) -> str:
        """Path of the run below its data set's group: ``<model>/<technique slug>-<8 hex>/t<timestep>``."""
        return f"{slug(self.model)}/{slug(self.technique)}-{self.family_digest}/t{self.timestep:03d}"

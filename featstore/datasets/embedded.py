"""toyhorse as a data set: 160 rendered pictures, in order train, val, test; and copies of them of low quality."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from typing_extensions import override

from featstore import cache
from featstore.datasets.base import Dataset, DatasetInfo, Keypoints, Sample, UInt8Array, other_bytes
from featstore.datasets.entries import DatasetEntry
from featstore.datasets.toyhorse import CLASSES, IMAGE_SIZE_PX, KEYPOINTS, SPLITS, Picture, degrade, render_split
from featstore.datasets.toyhorse.labels import RARE_COATS
from featstore.errors import BadRequestError

CAPTION_KINDS = ("plain", "fine")

INFO = DatasetInfo(
    name="toyhorse",
    title="Toyhorse: rendered horses with exact ground truth (embedded)",
    classes=CLASSES,
    image_classes=RARE_COATS,
    plain_prompt="a horse",
    prompt="a horse, high quality, best quality, highly realistic, masterpiece",
    quality_words={
        "low": "low quality, blurry, noisy",
        "high": "high quality, best quality, highly realistic, masterpiece",
    },
    model="reference",
    image_size_px=IMAGE_SIZE_PX,
    label_size_px=IMAGE_SIZE_PX,
    source="rendered by featstore itself from a fixed seed; nothing is downloaded",
)
DEGRADED_INFO = dataclasses.replace(
    INFO,
    name="toyhorse-degraded",
    title="Toyhorse with its pictures spoilt: blocks, blur and strong noise (embedded)",
)
_DEGRADE_TAG, _LOW_QUALITY = 0xBAD, 2
_KEYS = tuple((split, f"{split}-{number:03d}") for split, indices in SPLITS.items() for number in range(len(indices)))
_INDEX_OF = {key: index for index, (_, key) in enumerate(_KEYS)}


def _renderer_identity() -> str | None:
    """What the rendered bytes depend on: the renderer's source and the libraries it draws with."""
    folder = Path(__file__).parent / "toyhorse"
    sources = sorted(folder.glob("*.py"))
    if not sources:  # an installation without source files: nothing to recognise a changed renderer by
        return None
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.name}\0".encode() + hashlib.sha256(source.read_bytes()).digest())
    return f"{digest.hexdigest()} pillow {PIL.__version__} numpy {np.__version__}"


class ToyHorse(Dataset):
    """The embedded data set: uint8 (64, 64, 3) pictures, rendered when first asked for and kept."""

    _INFO = INFO
    _VARIANT = ""

    def __init__(self) -> None:
        self._pictures: dict[int, Picture] = {}
        self._lock = threading.Lock()
        self._facts: dict[str, Any] | None = None
        self._samples: tuple[Sample, ...] | None = None

    @property
    def info(self) -> DatasetInfo:
        """The fixed facts of the set."""
        return self._INFO

    @property
    def samples(self) -> tuple[Sample, ...]:
        """160 samples; ``digest`` is of the raw RGB bytes (64 * 64 * 3) of the rendered picture."""
        if self._samples is None:
            digests = self._load_facts()["digests"]
            self._samples = tuple(
                Sample(key=key, digest=digest, split=split) for (split, key), digest in zip(_KEYS, digests, strict=True)
            )
        return self._samples

    def picture(self, key: str) -> Picture:
        """Everything that was rendered with an image: keypoints, box, coat, captions.

        Raises:
            BadRequestError: if there is no such key.
        """
        if key not in _INDEX_OF:
            raise BadRequestError(f"toyhorse has no image {key!r}; its keys are train-000 .. test-099")
        return self._picture(_INDEX_OF[key])

    def image(self, key: str) -> UInt8Array:
        """The picture's pixels, uint8 (64, 64, 3); a copy."""
        return self.picture(key).image.copy()

    def image_as(self, key: str, digest: str) -> UInt8Array:
        """`image`, drawn by a renderer that draws it as it was listed."""
        image = self.image(key)
        if _digest(image) != digest:
            raise other_bytes(key)
        return image

    def mask(self, key: str) -> UInt8Array:
        """The picture's parts, uint8 (64, 64), labels 0..20 of Horse-21; a copy."""
        return self.picture(key).parts.copy()

    def keypoints(self, key: str) -> Keypoints:
        """The joints and landmarks of the picture's horse, and its box with its tack but without any person."""
        picture = self.picture(key)
        x0, y0, x1, y1 = map(float, picture.bbox)
        return Keypoints(
            names=KEYPOINTS,
            xy_px=picture.keypoints[:, :2].copy(),
            visible=picture.keypoints[:, 2] > 0,
            box_px=(x0, y0, x1, y1),
            category="horse",
        )

    def image_label(self, key: str) -> int:
        """The coat of the picture's horse; all pictures of the set are in the rare style, which has four."""
        return RARE_COATS.index(self.picture(key).coat)

    def caption(self, key: str, kind: str) -> str:
        """The picture's ``plain`` or ``fine`` caption, from ground truth (so: an oracle)."""
        if kind not in CAPTION_KINDS:
            raise BadRequestError(f"toyhorse has no captions {kind!r}; it has {', '.join(CAPTION_KINDS)}")
        picture = self.picture(key)
        return picture.caption if kind == "plain" else picture.fine_caption

    @property
    def caption_source(self) -> str:
        """``toyhorse/fine/`` and the digest of all captions, so that other captions make another recipe."""
        return f"toyhorse/fine/{self._load_facts()['captions']}"

    def _picture(self, index: int) -> Picture:
        # Rendering is deterministic, so two threads at worst draw the same picture twice.
        if index not in self._pictures:
            self._pictures[index] = self._render(index)
        return self._pictures[index]

    def _render(self, index: int) -> Picture:
        return render_split(index)

    def _load_facts(self) -> dict[str, Any]:
        """Digests of all pictures and captions: from the cache, else by rendering everything once."""
        with self._lock:
            if self._facts is None:
                renderer = _renderer_identity()
                identity = renderer and renderer + self._VARIANT
                facts = cache.load(self._INFO.name, identity) if identity else None
                if not isinstance(facts, dict) or facts.keys() != {"digests", "captions"}:
                    facts = self._find_facts()
                    if identity:
                        cache.save(self._INFO.name, identity, facts)
                self._facts = facts
            return self._facts

    def _find_facts(self) -> dict[str, Any]:
        pictures = [self._picture(index) for index in range(len(_KEYS))]
        captions = "\n".join(f"{picture.caption}\n{picture.fine_caption}" for picture in pictures)
        return {
            "digests": [_digest(picture.image) for picture in pictures],
            "captions": hashlib.sha256(captions.encode()).hexdigest()[:16],
        }


def _digest(image: UInt8Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


class DegradedToyHorse(ToyHorse):
    """The same pictures as `ToyHorse`, as spoilt as the model's words of low quality promise; same keys and labels."""

    _INFO = DEGRADED_INFO
    _VARIANT = f" degraded {_DEGRADE_TAG} {_LOW_QUALITY}"

    @override
    def _render(self, index: int) -> Picture:
        picture = super()._render(index)
        rng = np.random.default_rng(np.random.SeedSequence([_DEGRADE_TAG, index]))
        return dataclasses.replace(picture, image=degrade(picture.image, rng, _LOW_QUALITY))


def _open(_where: Path | None) -> ToyHorse:
    return ToyHorse()


def _open_degraded(_where: Path | None) -> ToyHorse:
    return DegradedToyHorse()


ENTRY = DatasetEntry(title=INFO.title, how_to_get="nothing to get: it is rendered on the spot", opener=_open)
DEGRADED_ENTRY = DatasetEntry(title=DEGRADED_INFO.title, how_to_get=ENTRY.how_to_get, opener=_open_degraded)

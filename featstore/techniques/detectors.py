"""What makes a ControlNet's condition from an image: which detectors there are, and where their weights lie. No torch.

`featstore.extraction.detectors` runs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featstore.errors import BadRequestError, NotFoundError, unknown_name
from featstore.models.digests import files_sha256
from featstore.models.files import TRANSFORMERS_STEM, read_json, weight_files
from featstore.models.hub import HubId, Remote, cache_folder
from featstore.models.weights_root import DEFAULT_ROOT, WEIGHTS_VARIABLE, asked_root

CANNY_THRESHOLDS = (100, 200)
"""Lower and upper threshold of `cv2.Canny`, the method's."""
FOLDER = "annotators"
"""Name of the folder of the detectors' weights."""
DEPTH_FOLDER = "depth"
"""Folder below it of a depth network of transformers, which goes before the MiDaS file."""
DEPTH_NETWORKS = ("DPTForDepthEstimation", "DepthAnythingForDepthEstimation")
"""What that folder may hold: networks whose output grows towards the camera, as ControlNets were trained on."""

_HUB = HubId(repo="lllyasviel/Annotators")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Detector:
    """One detector."""

    title: str
    """What it sees, a few words."""
    controlnet: str
    """Variant of the model's own ControlNets that is fed with it."""
    files: tuple[str, ...] = ()
    """Names of its weights in the folder of the annotators; none: it has no weights."""


DETECTORS: Mapping[str, Detector] = {
    "canny": Detector(title="edges", controlnet="canny"),
    "depth": Detector(title="depth", controlnet="depth", files=("dpt_hybrid-midas-501f0c75.pt",)),
    "hed": Detector(title="soft edges", controlnet="hed", files=("ControlNetHED.pth",)),
    "lineart": Detector(title="line drawing", controlnet="lineart", files=("sk_model.pth",)),
    "openpose": Detector(title="poses of people", controlnet="openpose", files=("body_pose_model.pth",)),
    "openpose-full": Detector(
        title="poses of people, with hands and faces",
        controlnet="openpose",
        files=("body_pose_model.pth", "hand_pose_model.pth", "facenet.pth"),
    ),
}
"""All detectors by name."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DetectorRef:
    """A detector with its weights on this machine."""

    name: str
    """A name of `DETECTORS`."""
    files: tuple[Path, ...] = ()
    """Its weights, in the order of `Detector.files`; of a network of transformers all files of its folder."""
    folder: Path | None = None
    """Folder of a network of transformers; None: it is one of controlnet-aux, or has no weights."""
    digest: str | None = None
    """SHA-256 of the files; None: it has none."""

    def parameters(self) -> dict[str, Any]:
        """What decides the condition besides the image, as plain JSON for recipes."""
        if self.digest is None:
            low, high = CANNY_THRESHOLDS
            return {"detector": self.name, "low": low, "high": high}
        return {"detector": self.name, "digest": self.digest}


def annotators_folder(weights_root: Path | None = None) -> Path:
    """Where weights of detectors are looked for: ``annotators`` below the root, ``$FEATSTORE_WEIGHTS`` or ./weights."""
    root, own = asked_root(weights_root), DEFAULT_ROOT / FOLDER
    return own if root is None or (own.is_dir() and not (root / FOLDER).is_dir()) else root / FOLDER


def find(name: str, *, weights_root: Path | None = None, allow_pickle: bool = False) -> DetectorRef:
    """The detector of a name, with its weights found and digested. Loads nothing.

    They are looked for in `annotators_folder`, where a file of the same name but for the suffix ``.safetensors`` goes
    before each, then in the Hugging Face cache, and fetched if they are nowhere and pickles are allowed.

    Args:
        name: a name of `DETECTORS`.
        weights_root: see `featstore.models.resolve`.
        allow_pickle: whether weights may be pickles, which those that are published are.

    Raises:
        BadRequestError: for an unknown name, or weights that are pickles without ``allow_pickle``.
        NotFoundError: if weights are missing; the message names them, the folder and where they come from.
        StorageError: if fetching them fails half way.
    """
    if name not in DETECTORS:
        raise unknown_name("detector", name, DETECTORS)
    wanted = DETECTORS[name].files
    if not wanted:
        return DetectorRef(name=name)
    folder = annotators_folder(weights_root)
    if name == "depth" and (folder / DEPTH_FOLDER).is_dir():
        return _depth_network(folder / DEPTH_FOLDER)
    files = _local(folder, wanted) or _cached(wanted)
    if files is None:
        absent = _absent(name, folder)
        if not allow_pickle:
            raise absent
        files = [Remote(_HUB, absent=absent).fetch(wanted) / file for file in wanted]
    pickles = [file.name for file in files if file.suffix != ".safetensors"]
    if pickles and not allow_pickle:
        raise BadRequestError(
            f"detector {name!r}: {', '.join(pickles)} in {files[0].parent} "
            f"{'are pickles' if len(pickles) > 1 else 'is a pickle'}, which can run code when read",
            hint=f"--allow-pickle reads tensors and nothing else of them; {Path(pickles[0]).stem}.safetensors in "
            f"{folder} would do without",
        )
    return DetectorRef(name=name, files=tuple(files), digest=files_sha256(files[0].parent, files))


def _local(folder: Path, names: Sequence[str]) -> list[Path] | None:
    """The files in the folder of annotators, if all are there."""
    safe = [(folder / name).with_suffix(".safetensors") for name in names]
    files = [one if one.is_file() else folder / name for one, name in zip(safe, names, strict=True)]
    return files if all(file.is_file() for file in files) else None


def _cached(names: Sequence[str]) -> list[Path] | None:
    """The files in the Hugging Face cache, if all are there. Asks no network."""
    places = [_HUB.snapshot(name) for name in names]
    return [place / name for place, name in zip(places, names, strict=True) if place] if all(places) else None


def _absent(name: str, folder: Path) -> NotFoundError:
    wanted = DETECTORS[name].files
    missing = [file for file in wanted if not _local(folder, [file])]
    instead = f"; or put a depth network of transformers into {folder / DEPTH_FOLDER}" if name == "depth" else ""
    return NotFoundError(
        f"detector {name!r}: no {', '.join(missing)} in {folder} or, as {_HUB}, in the Hugging Face cache "
        f"{cache_folder()}",
        hint=f"where there is a network: `{_HUB.command(folder, wanted)}`, or --allow-pickle, which reads such files "
        f"and fetches them{instead}; ${WEIGHTS_VARIABLE} names another place than ./{DEFAULT_ROOT}",
    )


def _depth_network(folder: Path) -> DetectorRef:
    config = read_json(folder / "config.json", "depth network")
    kinds = config.get("architectures") or []
    if not set(kinds) & set(DEPTH_NETWORKS):
        raise BadRequestError(
            f"{folder} holds a {' '.join(map(str, kinds)) or 'network of no name'}; "
            f"depth comes from {' or '.join(DEPTH_NETWORKS)}"
        )
    if config.get("depth_estimation_type", "relative") != "relative":
        raise BadRequestError(
            f"the depth network in {folder} estimates metres (depth_estimation_type "
            f"{config['depth_estimation_type']!r}), which grow away from the camera; ControlNets were trained on the "
            "relative kind"
        )
    processor = folder / "preprocessor_config.json"
    _ = read_json(processor, "depth network")
    files = (folder / "config.json", processor, *weight_files(folder, TRANSFORMERS_STEM).files)
    return DetectorRef(name="depth", files=files, folder=folder, digest=files_sha256(folder, files))

"""What a user, or the list beside an export, says of features that other code computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import featstore.models
import featstore.techniques
from featstore.errors import BadRequestError, CorruptError, NotFoundError, unknown_name
from featstore.pipelines import export_index
from featstore.recipe import COMPUTE_DTYPES, IMPORTED, IMPORTED_MEANING, TRAIN_TIMESTEPS, Recipe

COMPUTE_DTYPE = "float16"
"""Element type that the seed code computes in unless it is told otherwise."""
_OPTIONS = {"model": "--model", "technique": "--technique", "timestep": "--timestep", "image_size_px": "--image-size"}


def open_folder(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """The folder that holds the files, and what the list of an export in it says; None: it is no export.

    Raises:
        NotFoundError: if there is no such folder.
        BadRequestError: if it is an export of several runs, or to another format.
        CorruptError: if the list is damaged.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {str(folder)!r}")
    manifest = export_index.read_manifest(folder)
    if manifest is not None and "runs" in manifest:
        runs = export_index.run_folders(manifest, folder)
        if len(runs) != 1:
            raise BadRequestError(
                f"{folder} is an export of {len(runs)} runs; one at a time is imported: {', '.join(runs)}",
                hint=f"name the folder of one, e.g. {folder / runs[0]}",
            )
        folder = folder / runs[0]
        manifest = export_index.read_manifest(folder)
        if manifest is None:
            raise CorruptError(f"{folder / export_index.MANIFEST} is gone")
    if manifest is not None and manifest.get("format") != "npy":
        raise BadRequestError(
            f"{folder} is an export to {manifest.get('format')!r}, which holds no .npy files",
            hint="`featstore export --format npy` writes what can be imported again",
        )
    return folder, manifest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """How features are said to have been computed."""

    model: str
    """Public name of the model."""
    technique: str
    """Technique expression of one pass."""
    timestep: int
    """What the UNet was fed."""
    image_size_px: tuple[int, int]
    """Height and width of the model's input."""
    prompt: str | None = None
    """The text of the pass; None: not said."""
    denoise_from: int | None = None
    """Timestep at which a short denoising began; None: one noised pass."""
    compute_dtype: str = COMPUTE_DTYPE
    """Element type of the forward pass."""

    @classmethod
    def of(cls, said: Mapping[str, Any], manifest: Mapping[str, Any] | None, folder: Path) -> Claims:
        """What the user said, and of what he left open (None) what the list of an export in ``folder`` says.

        Raises:
            BadRequestError: if model, technique, timestep or size are said by nobody, or cannot be.
            CorruptError: if the list is damaged.
        """
        known = {} if manifest is None else _of_recipe(manifest.get("recipe"), folder / export_index.MANIFEST)
        values = known | {name: value for name, value in said.items() if value is not None}
        if lacking := [option for name, option in _OPTIONS.items() if name not in values]:
            raise BadRequestError(
                f"{folder} does not say how its features were computed: {', '.join(lacking)} must",
                hint="as in --model sd15 --technique prompt --timestep 50 --image-size 512",
            )
        return cls(**values)

    def __post_init__(self) -> None:
        """Refuse what no pass can have been."""
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise unknown_name("compute dtype", self.compute_dtype, COMPUTE_DTYPES)
        if min(self.image_size_px) < 1:
            raise BadRequestError(f"image size {self.image_size_px} is not positive")
        if self.denoise_from is not None and not self.timestep < self.denoise_from < TRAIN_TIMESTEPS:
            raise BadRequestError(f"--denoise-from {self.denoise_from} is outside {self.timestep + 1}..999")

    def recipe(self, *, digest: str, precision: str, details: Mapping[str, Any]) -> Recipe:
        """The recipe of a run that says so.

        Args:
            digest: SHA-256 (hex) over all that was imported.
            precision: element type on disk.
            details: how files were taken for images and layers, plain JSON.
        """
        passes = featstore.techniques.parse(self.technique)
        if len(passes) != 1:
            raise BadRequestError(f"{self.technique!r} lists {len(passes)} passes; a folder holds the features of one")
        prompt = {} if self.prompt is None else {"prompt": self.prompt}
        return Recipe(
            model=featstore.models.public_name(self.model),
            weights_digest=digest,
            technique=passes[0].expression,
            parameters={"import": dict(details), **prompt},
            timestep=self.timestep,
            denoise_from=self.denoise_from,
            scheduler=IMPORTED,
            height_px=self.image_size_px[0],
            width_px=self.image_size_px[1],
            compute_dtype=self.compute_dtype,
            precision=precision,
            meaning=IMPORTED_MEANING,
        )


def _of_recipe(recipe: Any, path: Path) -> dict[str, Any]:
    """What a recipe of any version says; its fingerprint is not held against it, as nothing but words is taken from it.

    Raises:
        CorruptError: if it is no recipe.
    """
    kinds = {"model": str, "technique": str, "timestep": int, "height_px": int, "width_px": int, "compute_dtype": str}
    if not isinstance(recipe, Mapping) or not all(isinstance(recipe.get(name), kind) for name, kind in kinds.items()):
        raise CorruptError(f"{path} has no recipe")
    parameters, start = recipe.get("parameters"), recipe.get("denoise_from")
    prompt = parameters.get("prompt") if isinstance(parameters, Mapping) else None
    return {
        **{name: recipe[name] for name in ("model", "technique", "timestep", "compute_dtype")},
        "image_size_px": (recipe["height_px"], recipe["width_px"]),
        "prompt": prompt if isinstance(prompt, str) else None,
        "denoise_from": start if isinstance(start, int) else None,
    }

"""The embedded model, a small Stable Diffusion of toyhorse's world.

Trained on the pretraining stream of toyhorse, with a canny ControlNet, an IP-Adapter with its image encoder, and two
LoRAs of the training images: one well trained, one slightly overfitted. The IP-Adapter is found by its place, the
folder ``ip-adapter`` beside the pipeline's.
"""

from __future__ import annotations

from pathlib import Path

from featstore.errors import NotFoundError
from featstore.models.entries import ModelEntry
from featstore.models.families import open_folder
from featstore.models.source import ModelSource

_HOW_TO_GET = "comes with featstore; `python -m featstore.pipelines.train_reference` trains it anew"


def _open(weights: Path) -> ModelSource:
    if not (weights / "pipeline" / "model_index.json").is_file():
        raise NotFoundError(
            f"the weights of model 'reference' are not in {weights}",
            hint="reinstall featstore, or train them: `python -m featstore.pipelines.train_reference`",
        )
    return open_folder(
        "reference",
        weights / "pipeline",
        controlnets={"canny": weights / "controlnet-canny"},
        loras={("toyhorse", None): weights / "lora", ("toyhorse", "overfit"): weights / "lora-overfit"},
    )


ENTRY = ModelEntry(
    name="reference",
    title="small Stable Diffusion of toy horses, embedded, 64 px",
    family="Stable Diffusion (UNet2DConditionModel, AutoencoderKL, CLIP text encoder)",
    default_folder=Path(__file__).parent / "weights",
    how_to_get=_HOW_TO_GET,
    opener=_open,
)

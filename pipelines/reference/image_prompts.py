"""The evaluation of the image encoder and the IP-Adapter, from their exported folder, loaded by diffusers' own loader.

Legend: `B` test pictures, `D` width of the embedding.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featstore.datasets import toyhorse
from featstore.pipelines.reference import measures
from featstore.pipelines.reference.config import TrainConfig
from featstore.pipelines.reference.data import to_images, to_pixels
from featstore.pipelines.reference.export import IP_ADAPTER, PIPELINE, load_pipeline
from featstore.pipelines.reference.image_encoder import ZERO_SHOT, embed
from featstore.pipelines.reference.ip_adapter import load_ip_adapter
from featstore.pipelines.reference.pictures import save_grid
from featstore.pipelines.reference.pool import TRAIN, VALIDATION, split_pictures
from featstore.pipelines.reference.probes import Judge, judge

START_TIMESTEPS = (300, 501, 800)
SEVERAL_DRAWS = (300, 501)
"""Timesteps from which every draw of the noise is denoised; from the others the first only."""
SHOWN = 8
"""Pictures a row."""

F64 = npt.NDArray[np.float64]


def linear_probe(train: F64, labels: list[str], test: F64, truth: list[str]) -> float:
    """Accuracy on ``test`` (M, D) of a logistic regression on ``train`` (N, D), features standardised."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(model.fit(train, labels).score(test, truth))


def probe_encoder(encoder: Any, tests: list[toyhorse.Picture], config: TrainConfig) -> dict[str, Any]:
    """What a linear probe, trained on the 60 pictures outside the test split, reads from embeddings and from pixels.

    Chance is the share of the commonest answer.
    """
    known = [*split_pictures(TRAIN), *split_pictures(VALIDATION)]
    stacks = [np.stack([picture.image for picture in pictures]) for pictures in (known, tests)]
    seen = [embed(encoder, stack, config.device).double().cpu().numpy() for stack in stacks]
    # Thumbnails of 8 x 8 are as much as a mean over each of the encoder's patches says.
    small = [stack.reshape(len(stack), 8, 8, 8, 8, 3).mean(axis=(2, 4)).reshape(len(stack), -1) for stack in stacks]
    result: dict[str, Any] = {"trained on": len(known), "tested on": len(tests)}
    for name in ("coat", "background"):
        labels, truth = ([str(getattr(picture, name)) for picture in pictures] for pictures in (known, tests))
        result[name] = {
            "embedding": linear_probe(seen[0], labels, seen[1], truth),
            "thumbnail of 8 px": linear_probe(small[0], labels, small[1], truth),
            "chance": max(truth.count(label) for label in truth) / len(truth),
        }
    note = config.work / "logs" / ZERO_SHOT
    if note.exists():
        result["zero shot, validation pictures"] = json.loads(note.read_text(encoding="utf-8"))
    return result


def evaluate_image_prompts(
    config: TrainConfig,
    *,
    pictures: list[toyhorse.Picture],
    latents: Tensor,
    prompts: list[str],
    network: Judge,
) -> dict[str, Any]:
    """Noise added and taken away again with no IP-Adapter, the picture's own view, and another picture's.

    Args:
        config: the run.
        pictures: B test pictures.
        latents: (B, 4, 16, 16) of them, scaled.
        prompts: B prompts.
        network: judges what comes out.

    Returns:
        plain JSON; writes ip-adapter.png into the report.
    """
    images = np.stack([picture.image for picture in pictures])
    plain, adapted = (load_pipeline(config.out / PIPELINE, config.device) for _ in range(2))
    load_ip_adapter(adapted, config.out / IP_ADAPTER)
    own = embed(adapted.image_encoder, images, config.device)
    sides: dict[str, tuple[Any, Tensor | None]] = {
        "without": (plain, None),
        "own": (adapted, own),
        "another's": (adapted, own.roll(1, 0)),
    }
    truth = _Truth(pictures, network, config.device)
    result: dict[str, Any] = {"encoder": probe_encoder(adapted.image_encoder, pictures, config)}
    rows = [list(images[:SHOWN])]
    for start in START_TIMESTEPS:
        draws = config.evaluation.draws if start in SEVERAL_DRAWS else 1
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for draw in range(draws):
            for name, (pipeline, seen) in sides.items():
                pixels = measures.denoise(
                    pipeline, latents, prompts, start, embeddings=seen, stride=config.evaluation.stride, seed=draw
                )
                found[name].append(truth.compared(pixels))
                if draw == 0:
                    rows.append(list(to_images(pixels[:SHOWN]).cpu().numpy()))
        for name, judged in found.items():
            result[f"t{start} {name}"] = _means(judged)
        errors = {name: np.stack([one["l1 each"] for one in judged]) for name, judged in found.items()}
        result[f"t{start} closer"] = {
            f"than {name}": float((errors["own"] < errors[name]).mean()) for name in errors if name != "own"
        }
    result["scale 0 is none"] = _bit_equal(adapted, plain, latents, prompts, own, config)
    save_grid(config.report / "ip-adapter.png", rows)
    return result


class _Truth:
    """What denoised test pictures are compared with."""

    def __init__(self, pictures: list[toyhorse.Picture], network: Judge, device: str) -> None:
        self._judge, coats = network, list(toyhorse.COATS)
        self._pixels = to_pixels(torch.from_numpy(np.stack([p.image for p in pictures]))).to(device)
        self._images = np.stack([p.image for p in pictures])
        self._parts = torch.from_numpy(np.stack([p.parts for p in pictures])).to(device).long()
        self._coats = torch.tensor([coats.index(p.coat) for p in pictures], device=device)

    def compared(self, pixels: Tensor) -> dict[str, Any]:
        """Likeness of (B, 3, 64, 64) pixels to the inputs, and their coats beside the inputs' and the one before's."""
        seen = judge(self._judge, pixels)
        each = (pixels - self._pixels).abs().mean(dim=(1, 2, 3))
        error = (pixels.clamp(-1, 1) - self._pixels).square().mean(dim=(1, 2, 3)) / 4
        return {
            "l1": float(each.mean()),
            "psnr_db": float((-10 * error.log10()).mean()),
            "edge_f1": measures.edge_f1(self._images, to_images(pixels).cpu().numpy()),
            "foreground_iou": measures.foreground_iou(seen.parts, self._parts),
            "part_accuracy": measures.accuracy(seen.parts, self._parts),
            "coat": measures.accuracy(seen.coats, self._coats),
            "coat_shuffled": measures.accuracy(seen.coats, self._coats.roll(1, 0)),
            "l1 each": each.cpu().numpy(),
        }


def _means(judged: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in judged[0] if name != "l1 each"]
    return {"draws": len(judged), **{name: float(np.mean([one[name] for one in judged])) for name in names}}


def _bit_equal(adapted: Any, plain: Any, latents: Tensor, prompts: list[str], own: Tensor, config: TrainConfig) -> bool:
    adapted.set_ip_adapter_scale(0.0)
    kept = [
        measures.denoise(pipeline, latents, prompts, 300, embeddings=seen, stride=config.evaluation.stride)
        for pipeline, seen in ((adapted, own), (plain, None))
    ]
    return torch.equal(*kept)

"""Img2Img of every technique from the same noise, and how close each comes to the input.

n images, B images of a batch, H W height and width in pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from featstore import similarity, similarity_networks
from featstore.pipelines.gate.img2img import Reconstructor, kinds_of, seed_of
from featstore.pipelines.gate.planning import GatePlan
from featstore.pipelines.gate.sample import Images
from featstore.pipelines.gate.scores import batch_size_of
from featstore.pipelines.progress import Progress

UInt8Array = npt.NDArray[np.uint8]
Float64Array = npt.NDArray[np.float64]

FARTHER = frozenset({"latent_distance", "lpips"})
"""Measures that are smaller for closer pictures; of the others more is closer."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reconstructions:
    """What became of the images."""

    pictures: Mapping[str, UInt8Array]
    """uint8 (n, H, W, 3) by technique."""
    measures: Mapping[str, Mapping[str, Float64Array]]
    """Each measure (n,) by technique."""
    pipelines: tuple[str, ...]
    """Names of diffusers' pipelines that ran."""
    scheduler: str
    """Name of the model's scheduler."""

    def closer(self, technique: str, measure: str) -> Float64Array:
        """A measure (n,), turned so that more is closer."""
        values = self.measures[technique][measure]
        return -values if measure in FARTHER else values

    def closeness(self, technique: str) -> Float64Array:
        """How much closer each image came than under ``basic`` (n,), in spreads of ``basic``, mean of all measures.

        A spread is the standard deviation of a measure over the images under ``basic``: measures with other units
        count alike. Measures without any spread are left out.
        """
        found = []
        for measure, values in self.measures["basic"].items():
            if (spread := float(values.std(ddof=1))) > 0:
                found.append((self.closer(technique, measure) - self.closer("basic", measure)) / spread)
        mean: Float64Array = np.mean(found, axis=0) if found else np.zeros(len(self.pictures["basic"]))
        return mean


def reconstruct(plan: GatePlan, images: Images, progress: Progress) -> Reconstructions | None:
    """Remake the images under every technique; None for families that diffusers has no Img2Img pipelines for here.

    Measures of networks are taken where their weights are at hand, see `featstore.similarity_networks`.
    """
    source = plan.extract.source
    kinds = kinds_of(source)
    if kinds is None:
        return None
    networks = {name: similarity_networks.load(name, plan.extract.device) for name in similarity_networks.available()}
    runs, config, size = plan.runs, plan.config, batch_size_of(plan, len(images.samples))
    seeds = [seed_of(config.seed, digest) for digest in images.digests]
    pictures: dict[str, UInt8Array] = {}
    measures: dict[str, dict[str, Float64Array]] = {}
    ran: dict[str, None] = {}
    with Reconstructor(source, plan.extract.device, plan.extract.runs[0].recipe.compute_dtype) as model:
        scheduler = model.scheduler
        inputs = _batched(model.latents, images.pixels, size)
        progress.start("Img2Img", len(plan.techniques) * len(images.samples), "images")
        try:
            for technique in plan.techniques:
                steering, run = runs[technique].steering, runs[technique]
                texts = run.captions(plan.extract.dataset, images.keys) or [steering.prompt or ""] * len(seeds)
                made = []
                for start in range(0, len(seeds), size):
                    rows = slice(start, start + size)
                    made.append(
                        model.run(
                            steering,
                            images.pixels[rows],
                            images.seen[rows],
                            texts[rows],
                            seeds[rows],
                            strength=config.strength,
                            steps=config.steps,
                        )
                    )
                    progress.advance(len(made[-1]))
                pictures[technique] = np.concatenate(made)
                ran[kinds.with_controlnet if steering.controlnets else kinds.plain] = None
                measures[technique] = {
                    "ssim": similarity.ssim(images.pixels, pictures[technique]),
                    "psnr_db": similarity.psnr_db(images.pixels, pictures[technique]),
                    "edge_f1": similarity.edge_f1(images.pixels, pictures[technique]),
                    "latent_distance": similarity.relative_distance(
                        inputs, _batched(model.latents, pictures[technique], size)
                    ),
                }
                for name, measure in networks.items():
                    measures[technique][name] = measure(images.pixels, pictures[technique])
        finally:
            progress.stop()
    return Reconstructions(pictures=pictures, measures=measures, pipelines=tuple(ran), scheduler=scheduler)


def _batched(
    function: Callable[[UInt8Array], npt.NDArray[np.float32]], images: UInt8Array, size: int
) -> npt.NDArray[np.float32]:
    return np.concatenate([function(images[start : start + size]) for start in range(0, len(images), size)])

"""Both parts of the gate, one after the other; the model is never twice in memory."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from featstore import similarity_networks
from featstore.pictures.files import publish
from featstore.pictures.img2img import save_img2img
from featstore.pipelines.gate.planning import GatePlan
from featstore.pipelines.gate.reconstruct import Reconstructions, reconstruct
from featstore.pipelines.gate.report import GateReport
from featstore.pipelines.gate.sample import Images, read_images
from featstore.pipelines.gate.scores import score
from featstore.pipelines.gate.verdict import judge
from featstore.pipelines.progress import Progress

JSON_FILE = "gate.json"
PICTURE_FILE = "gate.png"
_SHOWN_IMAGES = 8


def gate(plan: GatePlan, progress: Progress) -> GateReport:
    """Judge the techniques of a plan; with ``out``, write the report and a picture there.

    Raises:
        BadRequestError: if too few images can be read, or the anchor has no content shift.
        StorageError: if the report cannot be written.
    """
    start = time.perf_counter()
    config, extract = plan.config, plan.extract
    images, failed = read_images(plan)
    with extract.source.load(extract.device, extract.runs[0].recipe.compute_dtype) as model:
        scores = score(plan, images, model, progress)
    failed = {**failed, **scores.failed}
    images = images.only(scores.good)
    made = reconstruct(plan, images, progress)
    bytes_per_image = plan.bytes_per_image
    report = GateReport(
        plan=plan,
        judgements=tuple(
            judge((name, timestep), scores, made, seed=config.seed, bytes_per_image=bytes_per_image[name])
            for name in plan.techniques
            for timestep in config.timesteps
        ),
        images=tuple(images.keys),
        failed=failed,
        reconstructions=made,
        notes=tuple(_notes(plan, made)),
        seconds=time.perf_counter() - start,
    )
    if config.out is not None:
        _write(config.out, report, images)
    return report


def _notes(plan: GatePlan, made: Reconstructions | None) -> list[str]:
    """What a reader of the figures has to know."""
    source = plan.extract.source
    if made is None:
        return [
            f"there is no Img2Img for model {source.name!r} ({type(source).__name__}): judged by its features alone"
        ]
    notes = []
    absent = [name for name in similarity_networks.FILES if name not in made.measures["basic"]]
    if absent:
        notes.append(f"without {', '.join(absent)}, whose weights are not in the weights root")
    if any(run.steering.guidance is not None and run.steering.guidance <= 1 for run in plan.runs.values()):
        notes.append("diffusers' pipelines guide nothing at a guidance scale of 1 or less: their cfg is basic")
    if plan.config.misled:
        notes.append("ControlNets and IP-Adapters saw another image than the one that was judged")
    return notes


def _write(folder: Path, report: GateReport, images: Images) -> None:
    publish(folder / JSON_FILE, (json.dumps(report.to_json(), indent=2) + "\n").encode())
    made = report.reconstructions
    if made is None:
        return
    shown = np.linspace(0, len(images.keys) - 1, min(_SHOWN_IMAGES, len(images.keys))).round().astype(int)
    first = {one.technique: one for one in reversed(report.judgements)}
    config = report.plan.config
    save_img2img(
        folder / PICTURE_FILE,
        images.pixels[shown],
        {name: made.pictures[name][shown] for name in report.plan.techniques},
        captions={name: f"SSIM {first[name].measures['ssim']:.2f}" for name in report.plan.techniques},
        row_titles=[images.keys[row] for row in shown],
        title=f"{report.plan.extract.dataset_name}, {report.plan.extract.source.name}, Img2Img at {config.strength:g}",
    )

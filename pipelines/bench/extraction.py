"""Extraction end to end against its bare passes and against the common way."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import featstore.datasets
import featstore.models
from featstore.pipelines.batch import cpu_batch_size
from featstore.pipelines.bench.config import BenchConfig
from featstore.pipelines.bench.timing import command, in_turn, seconds
from featstore.pipelines.extract import execute
from featstore.pipelines.plan import ExtractConfig, Plan, make_plan
from featstore.pipelines.progress import Silent
from featstore.techniques import SteeringOptions

if TYPE_CHECKING:
    from featstore.models.backbones.base import Backbone


def bench_extract(config: BenchConfig, folder: Path) -> dict[str, Any]:
    """Three ways to the same features of basic, prompt, controlnet and lora, in turn; loading models left out.

    *End to end* is featstore: decode, encode, passes, store. *Bare* has its inputs ready in memory, calls the same
    modules with the same batch shape and drops what they return. The *common way* is eager diffusers with batch 1,
    one technique after another, each layer through ``.cpu()`` into a file of ``np.save``, without fsync. Beside
    them, the same extraction again, finished as it is, as a command of its own.
    """
    from featstore.pipelines.bench.common_way import CommonWay

    images = _as_files(config, folder / "toyhorse-files")
    plan = _plan(config, images, folder / "warm.zarr")
    backbone = plan.source.load(plan.device, plan.runs[0].recipe.compute_dtype)
    batch_size = config.batch_size or cpu_batch_size(plan.source, *_size(plan))
    bare = bare_passes(plan, backbone, batch_size)
    common = CommonWay(plan)
    bare()
    times, again = [], []
    for repeat in range(config.repeats):
        fresh = _plan(config, images, folder / f"{repeat}.zarr")
        loose = folder / f"{repeat}-npy"
        loose.mkdir()
        times.append(
            in_turn(
                repeat,
                functools.partial(execute, fresh, Silent(), backbone=backbone),
                bare,
                functools.partial(common, loose),
            )
        )
        again.append(seconds(functools.partial(command, "extract", *_words(fresh.config))))
    ours, bares, commons = zip(*times, strict=True)
    passes = plan.passes_todo
    ratios = [b / a for a, b, _ in times]
    gains = [c / a for a, _, c in times]
    return {
        "passes": passes,
        "device": plan.device,
        "batch_size": batch_size,
        "end_to_end_passes_per_second": passes / statistics.median(ours),
        "bare_passes_per_second": passes / statistics.median(bares),
        "common_way_passes_per_second": passes / statistics.median(commons),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "times_the_common_way": statistics.median(gains),
        "times_the_common_way_each": gains,
        "finished_extract_seconds": statistics.median(again),
        "finished_extract_ratio": statistics.median(b / a for a, b in zip(ours, again, strict=True)),
    }


def _as_files(config: BenchConfig, folder: Path) -> Path:
    """Pictures of toyhorse as PNG files, so that reading is decoding and not drawing them."""
    dataset = featstore.datasets.resolve("toyhorse")
    folder.mkdir()
    for sample in dataset.samples[: config.images]:
        Image.fromarray(dataset.image(sample.key)).save(folder / f"{sample.key}.png")
    return folder


def _size(plan: Plan) -> tuple[int, int]:
    return plan.runs[0].recipe.height_px, plan.runs[0].recipe.width_px


def _plan(config: BenchConfig, images: Path, store: Path) -> Plan:
    info = featstore.datasets.resolve("toyhorse").info
    lora = featstore.models.resolve("reference").lora_folder("toyhorse", None)
    return make_plan(
        ExtractConfig(
            dataset=f"folder:{images}",
            model="reference",
            techniques=f"basic,prompt,controlnet,lora:{lora}",
            steering=SteeringOptions(prompt=info.prompt),
            store=str(store),
            batch_size=config.batch_size,
            device=config.device,
            seed=config.seed,
        )
    )


def _words(config: ExtractConfig) -> list[str]:
    options = {
        "--dataset": config.dataset,
        "--techniques": config.techniques,
        "--store": config.store,
        "--model": config.model,
        "--prompt": config.steering.prompt,
        "--device": config.device,
        "--batch-size": config.batch_size,
        "--seed": config.seed,
    }
    return [word for option, value in options.items() if value is not None for word in (option, str(value))]


def bare_passes(plan: Plan, backbone: Backbone, batch_size: int) -> Callable[[], None]:
    """The VAE, ControlNet and UNet calls of a plan, whole and unhooked, on inputs that are ready.

    Returns:
        A function that makes all calls once and waits for the device.
    """
    import torch

    from featstore.extraction.controlnet import condition
    from featstore.extraction.detectors import edges
    from featstore.extraction.images import prepare, to_pixels

    device, dtype = backbone.device, backbone.dtype
    keys = [plan.dataset.samples[index].key for index in plan.wanted]
    images = np.stack([prepare(plan.dataset.image(key), *_size(plan)) for key in keys])
    batches = -(-len(images) // batch_size)
    images = images[np.resize(np.arange(len(images)), batches * batch_size)]
    pixels = [to_pixels(part).to(device) for part in np.split(images, batches)]
    seen = [condition([edges(image) for image in part], device).to(dtype) for part in np.split(images, batches)]
    passes = []
    for run in plan.runs:
        # Loaded outside of inference mode, whose tensors peft cannot go on working with.
        adapters = tuple((backbone.lora(ref.path, ref.digest), ref.scale) for ref in run.steering.loras)
        nets = [backbone.controlnet(ref.folder, ref.digest) for ref in run.steering.controlnets]
        with torch.inference_mode(), backbone.adapted(adapters):
            words = backbone.encode_text(run.steering.prompt or "")
            text = {name: value.expand(batch_size, *value.shape[1:]) for name, value in words.items()}
        passes.append((adapters, nets, text, torch.full((batch_size,), run.recipe.timestep, device=device)))

    def call() -> None:
        with torch.inference_mode():
            latents = [backbone.encode_images(batch) for batch in pixels]
            for adapters, nets, text, steps in passes:
                with backbone.adapted(adapters):
                    for rows, edge in zip(latents, seen, strict=True):
                        inputs = backbone.inputs(rows, steps, text, *_size(plan))
                        extra: dict[str, Any] = {}
                        for net in nets:
                            down, middle = net(controlnet_cond=edge, return_dict=False, **inputs)
                            extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
                        backbone.denoiser(return_dict=False, **inputs, **extra)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    return call

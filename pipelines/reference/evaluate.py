"""Stage `evaluate`: the numbers and pictures of the model card, from the exported folders alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from torch import Tensor

from featstore.datasets import toyhorse
from featstore.pipelines.reference import measures
from featstore.pipelines.reference.captions import CLASS_CAPTION, LOW_PROMPT, PROMPT
from featstore.pipelines.reference.config import CHECKS, TrainConfig
from featstore.pipelines.reference.data import to_images, to_pixels
from featstore.pipelines.reference.export import (
    CONTROLNET,
    LORA,
    LORA_OVERFIT,
    PIPELINE,
    load_pipeline,
    pack,
    size_bytes,
)
from featstore.pipelines.reference.features import feature_probe
from featstore.pipelines.reference.image_prompts import evaluate_image_prompts
from featstore.pipelines.reference.lora import denoising_loss, scaled_latents
from featstore.pipelines.reference.pictures import save_grid, save_loss_curves
from featstore.pipelines.reference.pool import TEST, TRAIN, VALIDATION, PoolRender, edges_of, split_pictures
from featstore.pipelines.reference.probes import Judge, judge, load_judge

logger = logging.getLogger(__name__)

LOSS_TIMESTEPS = (50, 200, 500)
SHIFT_TIMESTEPS = (300, 501, 800)
SHOWN = 8
"""Images a row in the pictures."""


class Evaluation:
    """One evaluation of an exported model; every method adds its numbers and pictures."""

    def __init__(self, config: TrainConfig, render: PoolRender | None) -> None:
        self.config, self.device, self.stride = config, config.device, config.evaluation.stride
        self.pipeline = load_pipeline(config.out / PIPELINE, config.device)
        self.controlnet: ControlNetModel = (
            ControlNetModel.from_pretrained(config.out / CONTROLNET, dtype=torch.float32, local_files_only=True)
            .to(config.device)
            .requires_grad_(False)
            .eval()
        )
        self.judge: Judge = load_judge(config, render)
        pack(config)
        self.pictures = split_pictures(TEST)[: config.evaluation.test_images]
        self.images = np.stack([picture.image for picture in self.pictures])
        self.parts = torch.from_numpy(np.stack([p.parts for p in self.pictures])).to(self.device).long()
        coats = list(toyhorse.COATS)
        self.coats = torch.tensor([coats.index(p.coat) for p in self.pictures], device=self.device)
        self.latents = scaled_latents(self.pipeline, self.images)
        edges = np.stack([edges_of(image) for image in self.images])
        self.hints = torch.from_numpy(edges).to(self.device).float()[:, None].repeat(1, 3, 1, 1) / 255
        self.captions = {
            "fixed": [PROMPT] * len(self.pictures),
            "detailed": [picture.fine_caption for picture in self.pictures],
        }

    def judged(self, pixels: Tensor) -> dict[str, float]:
        """How well the images that ``pixels`` show agree with the truth, and with the next image's truth."""
        seen = judge(self.judge, pixels)
        return {
            "foreground_iou": measures.foreground_iou(seen.parts, self.parts),
            "coat": measures.accuracy(seen.coats, self.coats),
            "foreground_iou_shuffled": measures.foreground_iou(seen.parts, self.parts.roll(1, 0)),
            "coat_shuffled": measures.accuracy(seen.coats, self.coats.roll(1, 0)),
            "part_accuracy": measures.accuracy(seen.parts, self.parts),
            "edge_f1": measures.edge_f1(self.images, to_images(pixels).cpu().numpy()),
            "l1": float((pixels - to_pixels(torch.from_numpy(self.images).to(self.device))).abs().mean()),
        }

    def samples(self) -> dict[str, Any]:
        """Unpicked samples by the stock pipeline, one seed each, at high and at low prompted quality."""
        e, sharp = self.config.evaluation, {}
        for name, prompt in (("samples", PROMPT), ("samples-low-quality", LOW_PROMPT)):
            count = e.samples if name == "samples" else min(16, e.samples)
            images = self._generate(self.pipeline, [prompt] * count)
            sharp[name] = measures.sharpness(images[: min(16, count)])
            save_grid(
                self.config.report / f"{name}.png",
                [list(images[i : i + SHOWN]) for i in range(0, count, SHOWN)],
            )
        captions = self.captions["detailed"][: 2 * SHOWN]
        images = self._generate(self.pipeline, captions)
        truth = self.images[: len(captions)]
        save_grid(self.config.report / "captions.png", _interleave(list(truth), list(images)))
        coats = judge(self.judge, to_pixels(torch.from_numpy(images).to(self.device))).coats
        return {
            "seeds": [0, e.samples - 1],
            "guidance": e.guidance,
            "steps": e.sampling_steps,
            "sharpness": {**sharp, "test images": measures.sharpness(self.images)},
            "coat_as_captioned": measures.accuracy(coats, self.coats[: len(captions)]),
        }

    def _generate(self, pipeline: Any, prompts: list[str], **extra: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        e = self.config.evaluation
        images = pipeline(
            prompts,
            num_inference_steps=e.sampling_steps,
            guidance_scale=e.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(len(prompts))],
            output_type="np",
            **extra,
        ).images
        return np.asarray((images * 255).round(), dtype=np.uint8)

    def denoising(self) -> dict[str, Any]:
        """Noise at t = 300 taken away again, judged, mean over draws; beside it the originals and the autoencoder."""
        original = to_pixels(torch.from_numpy(self.images).to(self.device))
        rebuilt = measures.decode(self.pipeline, self.latents)
        result: dict[str, Any] = {"original": self.judged(original), "autoencoder": self.judged(rebuilt)}
        rows = [list(self.images[:SHOWN]), list(to_images(rebuilt[:SHOWN]).cpu().numpy())]
        for name, prompts in self.captions.items():
            judged = []
            for draw in range(self.config.evaluation.draws):
                pixels = measures.denoise(self.pipeline, self.latents, prompts, 300, stride=self.stride, seed=draw)
                judged.append(self.judged(pixels))
                if draw == 0:
                    rows.append(list(to_images(pixels[:SHOWN]).cpu().numpy()))
            mean = {key: float(np.mean([one[key] for one in judged])) for key in judged[0]}
            result[f"t300 {name}"] = {**mean, "coat_draws": [one["coat"] for one in judged]}
        save_grid(self.config.report / "denoised.png", rows)
        return result

    def control(self) -> dict[str, Any]:
        """Denoising from several timesteps with and without the edges, and samples from edges alone."""
        result: dict[str, Any] = {}
        rows = [list(self.images[:SHOWN])]
        for start in SHIFT_TIMESTEPS:
            for name, network in (("without", None), ("with", self.controlnet)):
                pixels = measures.denoise(
                    self.pipeline,
                    self.latents,
                    self.captions["fixed"],
                    start,
                    controlnet=network,
                    hints=self.hints,
                    stride=self.stride,
                )
                result[f"t{start} {name}"] = self.judged(pixels)
                rows.append(list(to_images(pixels[:SHOWN]).cpu().numpy()))
        save_grid(self.config.report / "controlnet.png", rows)
        stock = StableDiffusionControlNetPipeline(
            **self.pipeline.components, controlnet=self.controlnet, requires_safety_checker=False
        )
        stock.set_progress_bar_config(disable=True)
        count = min(SHOWN, len(self.pictures))
        images = self._generate(stock, self.captions["detailed"][:count], image=self.hints[:count])
        result["samples edge_f1"] = measures.edge_f1(self.images[:count], images)
        edges = [(255 * hint).byte().permute(1, 2, 0).cpu().numpy() for hint in self.hints[:count]]
        save_grid(self.config.report / "controlnet-samples.png", [list(self.images[:count]), edges, list(images)])
        return result

    def adapters(self) -> dict[str, Any]:
        """Denoising losses on the splits, and denoising from t = 501, with each LoRA and without."""
        splits = {
            "train": split_pictures(TRAIN),
            "validation": split_pictures(VALIDATION),
            "test": self.pictures,
        }
        latents = {
            name: scaled_latents(self.pipeline, np.stack([picture.image for picture in pictures]))
            for name, pictures in splits.items()
        }
        result: dict[str, Any] = {}
        for name in ("basic", LORA, LORA_OVERFIT):
            pipeline = load_pipeline(self.config.out / PIPELINE, self.device)
            if name != "basic":
                pipeline.load_lora_weights(self.config.out / name, local_files_only=True)
            result[name] = {
                split: denoising_loss(
                    pipeline, rows, [PROMPT] * len(rows), LOSS_TIMESTEPS, repeats=self.config.evaluation.loss_repeats
                )
                for split, rows in latents.items()
            }
            pixels = measures.denoise(pipeline, self.latents, self.captions["fixed"], 501, stride=self.stride)
            result[name]["t501"] = self.judged(pixels)
            images = self._generate(pipeline, [PROMPT] * min(16, self.config.evaluation.samples))
            save_grid(
                self.config.report / f"samples-{name}.png",
                [list(images[i : i + SHOWN]) for i in range(0, len(images), SHOWN)],
            )
        return result

    def image_prompts(self) -> dict[str, Any]:
        """What the image encoder sees, and denoising with and without the IP-Adapter."""
        return evaluate_image_prompts(
            self.config,
            pictures=self.pictures,
            latents=self.latents,
            prompts=self.captions["fixed"],
            network=self.judge,
        )

    def prompts(self) -> dict[str, Any]:
        """Denoising losses on the test images by prompt."""
        count = len(self.pictures)
        choices = {
            "empty": [""] * count,
            "class": [CLASS_CAPTION] * count,
            "low quality": [LOW_PROMPT] * count,
            **self.captions,
        }
        return {
            name: denoising_loss(
                self.pipeline, self.latents, texts, (50, 200, 500, 800), repeats=self.config.evaluation.loss_repeats
            )
            for name, texts in choices.items()
        }

    def half_precision(self) -> dict[str, Any]:
        """Whether the float16 pipeline, as stored, gives finite images on this device."""
        if not self.device.startswith("cuda"):
            return {"checked": False}
        pipeline = StableDiffusionPipeline.from_pretrained(
            self.config.out / PIPELINE, dtype=torch.float16, local_files_only=True
        ).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        images = self._generate(pipeline, [PROMPT] * 4)
        return {"checked": True, "deviation": float(images.std())}

    def features(self) -> dict[str, Any]:
        """The quick feature probe."""
        return feature_probe(self.config, self.pipeline)


def _interleave(a: list[Any], b: list[Any]) -> list[list[Any]]:
    rows = []
    for start in range(0, len(a), SHOWN):
        rows += [a[start : start + SHOWN], b[start : start + SHOWN]]
    return rows


def verdict(numbers: dict[str, Any]) -> dict[str, bool]:
    """The acceptance criteria that these numbers, as read from JSON, speak to."""
    denoised, probe = numbers["denoising"]["t300 fixed"], numbers["features"]
    control, adapters = numbers["control"], numbers["adapters"]
    return {
        "t300 foreground IoU >= 0.6": denoised["foreground_iou"] >= 0.6,
        "t300 coat >= 0.8": denoised["coat"] >= 0.8,
        "features >= 1.4 x and 8 points": probe["ratio"] >= 1.4 and probe["points"] >= 8,
        "edges raise IoU at 501": control["t501 with"]["foreground_iou"] > control["t501 without"]["foreground_iou"],
        "lora lowers the test loss": all(
            adapters[LORA]["test"][str(t)] < adapters["basic"]["test"][str(t)] for t in LOSS_TIMESTEPS
        ),
        "own picture beats none and another's at 501": _own_helps(numbers["image-prompts"]),
        "at most 30 MB": numbers["size"]["total_bytes"] <= 30_000_000,
    }


def _own_helps(numbers: dict[str, Any]) -> bool:
    own, without, other = (numbers[f"t501 {name}"] for name in ("own", "without", "another's"))
    return bool(own["l1"] < min(without["l1"], other["l1"]) and own["coat"] > max(without["coat"], other["coat"]))


def evaluate(config: TrainConfig, render: PoolRender | None) -> dict[str, Any]:
    """Run every check, write evaluation.json and the pictures, and return the numbers."""
    config.report.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(config, render)
    sizes = {folder.name: size_bytes(folder) for folder in sorted(config.out.iterdir()) if folder.is_dir()}
    numbers: dict[str, Any] = {"device": config.device, "size": {**sizes, "total_bytes": sum(sizes.values())}}
    chosen, kept = config.evaluation.checks, config.report / "evaluation.json"
    if set(chosen) < set(CHECKS) and kept.exists():
        numbers = json.loads(kept.read_text(encoding="utf-8")) | numbers
    failed = []
    for name in chosen:
        check: Callable[[], dict[str, Any]] = getattr(evaluation, name.replace("-", "_"))
        try:
            numbers[name] = check()
        except Exception:
            logger.exception("evaluate: %s failed; the other checks go on", name)
            failed.append(name)
            continue
        logger.info("evaluate: %s %s", name, json.dumps(_rounded(numbers[name])))
        _write(config, numbers)
    if not failed and set(CHECKS) <= set(numbers):
        # As read back: numbers kept from the last report have their timesteps as text.
        numbers["verdict"] = verdict(json.loads(json.dumps(numbers)))
        logger.info("evaluate: verdict %s", numbers["verdict"])
    _write(config, numbers)
    save_loss_curves(config.report / "loss-curves.png", config.work / "logs")
    pack(config)
    if failed:
        raise RuntimeError(f"these checks failed, see the log: {', '.join(failed)}")
    return numbers


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def _write(config: TrainConfig, numbers: dict[str, Any]) -> None:
    text = json.dumps(_rounded(numbers), indent=1).replace("NaN", "null")
    (config.report / "evaluation.json").write_text(text + "\n", encoding="utf-8")

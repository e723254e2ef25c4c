"""Trains the embedded `reference` model from nothing: pool, VAE, UNet, ControlNet, LoRAs, IP-Adapter, evaluation.

Run as ``python -m featstore.pipelines.train_reference --work DIR --out DIR``. Every stage is seeded,
writes checkpoints into ``--work`` and resumes from them when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from featstore.errors import BadRequestError
from featstore.pipelines.reference.config import CHECKS, STAGES, TrainConfig, preset, with_lengths

if TYPE_CHECKING:
    from featstore.pipelines.reference.pool import PoolRender

logger = logging.getLogger("featstore.train_reference")


def parse(arguments: Sequence[str] | None = None) -> tuple[TrainConfig, tuple[str, ...]]:
    """The configuration and the stages that the command line asks for."""
    parser = argparse.ArgumentParser(prog="train_reference", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="pool, checkpoints and logs (gigabytes)")
    parser.add_argument("--out", type=Path, required=True, help="receives the trained model")
    parser.add_argument("--report", type=Path, help="receives evaluation.json and pictures [WORK/report]")
    parser.add_argument("--preset", choices=("cpu", "gpu", "smoke"), help="sizes [gpu on CUDA, else cpu]")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--device", default="cpu", help="torch device [cpu]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(STAGES), help=f"some of {','.join(STAGES)} [all]")
    parser.add_argument("--steps", default="", help="lengths in steps, as vae=2000,unet=7000")
    parser.add_argument("--minutes", default="", help="lengths as budgets, as vae=3,unet=10,controlnet=4")
    parser.add_argument("--checks", help=f"some of {','.join(CHECKS)}; the report keeps its other numbers [all]")
    parser.add_argument("--pool", type=int, help="pictures of the stream to render")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="render processes")
    parser.add_argument("--no-compile", action="store_true", help="never try torch.compile")
    given = parser.parse_args(arguments)
    name = "smoke" if given.smoke else given.preset or ("gpu" if given.device.startswith("cuda") else "cpu")
    config = preset(
        name,
        work=given.work,
        out=given.out,
        report=given.report or given.work / "report",
        device=given.device,
        workers=given.workers,
    )
    pool = given.pool or config.pool_images
    config = replace(
        config,
        seed=given.seed,
        pool_images=pool,
        vae_images=min(config.vae_images, pool),
        compile=config.compile and not given.no_compile,
        evaluation=replace(config.evaluation, checks=tuple(given.checks.split(",")) if given.checks else CHECKS),
    )
    steps = {key: int(value) for key, value in _pairs(given.steps).items()}
    stages = tuple(given.stages.split(","))
    for stage in stages:
        if stage not in STAGES:
            raise BadRequestError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}")
    return with_lengths(config, steps=steps, minutes=_pairs(given.minutes)), stages


def _pairs(text: str) -> dict[str, float]:
    try:
        return {key: float(value) for key, value in (item.split("=") for item in text.split(",") if item)}
    except ValueError:
        raise BadRequestError(f"not a list of name=number: {text!r}") from None


def train(config: TrainConfig, stages: Sequence[str]) -> None:
    """Run ``stages`` in their order."""
    import diffusers
    import transformers

    from featstore.pipelines.reference.pool import PoolRender

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for folder in (config.work / "logs", config.out):
        folder.mkdir(parents=True, exist_ok=True)
    _describe(config, stages)
    trains = {"vae", "unet", "controlnet"} & set(stages)
    judge_kept = (config.work / "probes" / "judge.safetensors").exists()
    render = None
    looks = {"image-encoder", "ip-adapter"} & set(stages)
    if "pool" in stages or trains or looks or ("evaluate" in stages and not judge_kept):
        render = PoolRender(config.work / "pool", images=config.pool_images, seed=config.seed, workers=config.workers)
    try:
        if trains:
            assert render is not None
            _train_networks(config, trains, render)
        elif render is not None:
            render.wait()
        if "lora" in stages:
            from featstore.pipelines.reference.lora import train_lora

            with timed("lora"):
                train_lora(config)
        if looks:
            assert render is not None
            _train_ip_adapter(config, looks, render)
        if "evaluate" in stages:
            from featstore.pipelines.reference.evaluate import evaluate

            with timed("evaluate"):
                evaluate(config, render)
    finally:
        if render is not None:
            render.close()
    logger.info("ALL DONE: %s", ",".join(stages))


def _train_networks(config: TrainConfig, stages: set[str], render: PoolRender) -> None:
    import torch

    from featstore.datasets import toyhorse
    from featstore.pipelines.reference.controlnet import train_controlnet
    from featstore.pipelines.reference.data import latent_pool
    from featstore.pipelines.reference.denoiser import train_denoiser
    from featstore.pipelines.reference.tokens import build_tokenizer
    from featstore.pipelines.reference.vae import train_vae

    torch.set_float32_matmul_precision("high")
    with timed("vae"):
        vae = train_vae(config, render)
    if stages == {"vae"}:
        return
    tokenizer = build_tokenizer(toyhorse.VOCABULARY, config.work / "tokenizer")
    with timed("latents"):
        pool = latent_pool(render.wait(), vae, tokenizer, config.device)
    with timed("unet"):
        denoiser = train_denoiser(config, vae, tokenizer, pool)
    if "controlnet" in stages:
        with timed("controlnet"):
            train_controlnet(config, denoiser, pool)


def _train_ip_adapter(config: TrainConfig, stages: set[str], render: PoolRender) -> None:
    """Both stages stand on the exported pipeline alone, and so can follow another training of it."""
    from featstore.pipelines.reference.image_encoder import train_image_encoder
    from featstore.pipelines.reference.ip_adapter import train_ip_adapter

    if "image-encoder" in stages:
        with timed("image-encoder"):
            train_image_encoder(config, render)
    if "ip-adapter" in stages:
        with timed("ip-adapter"):
            train_ip_adapter(config, render)


class timed:  # noqa: N801 - reads as a statement
    """Logs how long its body took."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._began = time.monotonic()
        logger.info("== %s begins", self._name)

    def __exit__(self, kind: object, *_: object) -> None:
        state = "failed" if kind else "done"
        logger.info("== %s %s after %.1f s", self._name, state, time.monotonic() - self._began)


def _describe(config: TrainConfig, stages: Sequence[str]) -> None:
    import torch

    packages = {}
    for name in ("torch", "diffusers", "transformers", "peft", "safetensors", "tokenizers", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "absent"
    cuda = config.device.startswith("cuda")
    facts = {
        "stages": list(stages),
        "config": asdict(config),
        "packages": packages,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    with (config.work / "logs" / "runs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts, default=str) + "\n")
    logger.info("%s", json.dumps(facts, default=str))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, configure logging, run; 2 for a bad request."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        config, stages = parse(arguments)
    except BadRequestError:
        logger.exception("bad request")
        return 2
    train(config, stages)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

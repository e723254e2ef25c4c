"""Every number of the training run, in one frozen tree, with a preset for each kind of machine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from featstore.errors import BadRequestError, unknown_name

STAGES = ("pool", "vae", "unet", "controlnet", "lora", "image-encoder", "ip-adapter", "evaluate")
"""The stages in their order; each resumes from what the ones before it left in the work folder."""

TRAINED = ("vae", "unet", "controlnet", "lora", "image-encoder", "ip-adapter")
"""The stages that take optimiser steps, and so may have a budget of minutes."""

CHECKS = ("denoising", "features", "control", "adapters", "image-prompts", "prompts", "samples", "half_precision")
"""The checks of the evaluation in their order, as evaluation.json names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stage's optimisation."""

    steps: int
    """Optimiser steps; replaced by the planned number when a budget of minutes is given."""
    batch: int
    """Images a step."""
    learning_rate: float
    """Peak of the schedule: linear warm-up, then a cosine down to a fiftieth."""
    warmup: int = 200
    """Steps of linear warm-up; a fixed number, so that a planned length does not change the start."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is what gets exported."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    minutes: float | None = None
    """Wall-clock budget; the number of steps is then planned from a measured rate."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.learning_rate <= 0 or not 0 <= self.ema_decay < 1:
            raise ValueError(f"not a stage that can be trained: {self}")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"a budget must be positive, got {self.minutes} minutes")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shapes of the networks; the defaults are the ones that ship."""

    image_px: int = 64
    """Side of the images."""
    vae_widths: tuple[int, ...] = (32, 64, 64)
    """Channels of the autoencoder's levels; three levels make it reduce four times."""
    unet_widths: tuple[int, ...] = (32, 64, 128, 128)
    """Channels of the denoiser's four levels."""
    hint_widths: tuple[int, ...] = (16, 32, 64)
    """Channels of the ControlNet's hint encoder: n widths halve the side n - 1 times."""
    text_width: int = 96
    """Width of the text encoder, and of the denoiser's cross-attention."""
    text_layers: int = 3
    """Layers of the text encoder."""
    heads: int = 4
    """Attention heads, everywhere."""
    groups: int = 8
    """Groups of the group norms."""
    lora_rank: int = 8
    """Rank of the LoRAs; their alpha is half of it."""
    vision_width: int = 96
    """Width of the image encoder, and of its embedding."""
    vision_layers: int = 4
    """Layers of the image encoder."""
    vision_patch_px: int = 8
    """Side of the image encoder's patches."""
    image_tokens: int = 4
    """Tokens that the IP-Adapter makes of an embedding; diffusers knows no other number for this kind."""

    @property
    def latent_px(self) -> int:
        """Side of the latents."""
        return self.image_px >> (len(self.vae_widths) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Sizes of the evaluation."""

    samples: int = 64
    """Unpicked samples, seeds 0 .. samples - 1."""
    sampling_steps: int = 30
    """Scheduler steps a sample."""
    guidance: float = 3.0
    """Classifier-free guidance of the samples."""
    test_images: int = 100
    """Images of the test split used."""
    loss_repeats: int = 4
    """Draws of the noise when losses are compared."""
    checks: tuple[str, ...] = CHECKS
    """Checks to run; where they are not all of them, the numbers of the others are kept from the last report."""
    stride: int = 10
    """Timesteps between two passes when denoising."""
    draws: int = 5
    """Draws of the noise that the first table's figures are means of: a single one moves coats by 2 to 3 points."""
    rare_pictures: int = 3000
    """Pictures of the rare style, from the stream beyond the pool, that the judge sees besides the pool."""
    probe_steps: int = 3000
    """Steps of the segmenter and of the coat classifier."""
    head_steps: int = 1500
    """Steps of the pixel classifiers of the feature probe."""
    head_seeds: int = 3
    """Seeds of those pixel classifiers."""

    def __post_init__(self) -> None:
        for name in self.checks:
            if name not in CHECKS:
                raise unknown_name("check", name, CHECKS)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The whole run."""

    work: Path
    """Folder of the pool, the checkpoints and the logs; large, and kept out of git."""
    out: Path
    """Folder that receives the exported model."""
    report: Path
    """Folder that receives evaluation.json and the pictures."""
    device: str = "cpu"
    """Torch device."""
    seed: int = 0
    """Seed of everything."""
    compile: bool = False
    """Whether to try torch.compile on the denoiser; used only if it works and is faster."""
    workers: int = 1
    """Render processes."""
    pool_images: int = 30_000
    """Pictures of the pretraining stream."""
    vae_images: int = 6_000
    """The first so many of them train the autoencoder, which can start before the rest is rendered."""
    ip_adapter_images: int = 6_000
    """The first so many of them train the IP-Adapter; encoding all would take longer than its few steps."""
    checkpoint_seconds: float = 60.0
    """Seconds between checkpoints."""
    lora_every: int = 50
    """Steps between two looks at the validation loss while the LoRA trains."""
    lora_timesteps: tuple[int, ...] = (25, 50, 100, 200, 300, 400, 500, 600, 700, 800)
    """Timesteps at which that loss is measured."""
    vae: StageConfig = field(default_factory=lambda: StageConfig(steps=2000, batch=16, learning_rate=1e-3))
    unet: StageConfig = field(default_factory=lambda: StageConfig(steps=7000, batch=16, learning_rate=8e-4))
    controlnet: StageConfig = field(default_factory=lambda: StageConfig(steps=2000, batch=16, learning_rate=8e-4))
    # Hot and long enough for 30 images to be overfitted: both LoRAs are cut from this one training.
    lora: StageConfig = field(
        default_factory=lambda: StageConfig(steps=1000, batch=10, learning_rate=4e-3, warmup=50, ema_decay=0.99)
    )
    image_encoder: StageConfig = field(
        default_factory=lambda: StageConfig(steps=1000, batch=192, learning_rate=1e-3, weight_decay=0.05)
    )
    ip_adapter: StageConfig = field(
        default_factory=lambda: StageConfig(steps=1200, batch=16, learning_rate=2e-3, warmup=50)
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if not 0 < self.vae_images <= self.pool_images:
            raise ValueError(f"vae_images must be in 1..{self.pool_images}, got {self.vae_images}")

    def stage(self, name: str) -> StageConfig:
        """The optimisation of one stage, by name."""
        stage: StageConfig = getattr(self, _field(name))
        return stage


def _field(stage: str) -> str:
    """The field of `TrainConfig` that holds a stage of `TRAINED`."""
    return stage.replace("-", "_")


def preset(name: str, *, work: Path, out: Path, report: Path, device: str, workers: int) -> TrainConfig:
    """The configuration of one kind of machine: `cpu`, `gpu`, or `smoke` (seconds, untrained)."""
    base = TrainConfig(work=work, out=out, report=report, device=device, workers=workers)
    if name == "cpu":
        return replace(base, evaluation=EvalConfig(stride=20, probe_steps=1500))
    if name == "gpu":
        return replace(
            base,
            compile=True,
            evaluation=EvalConfig(probe_steps=2000),
            pool_images=200_000,
            vae_images=40_000,
            ip_adapter_images=200_000,
            vae=StageConfig(steps=8000, batch=128, learning_rate=8e-4),
            unet=StageConfig(steps=25_000, batch=512, learning_rate=1e-3, warmup=500, ema_decay=0.9995),
            controlnet=StageConfig(steps=6000, batch=256, learning_rate=1e-3),
            lora=StageConfig(steps=1000, batch=30, learning_rate=1e-3, warmup=50),
            image_encoder=StageConfig(steps=8000, batch=1024, learning_rate=1e-3, weight_decay=0.05),
            ip_adapter=StageConfig(steps=8000, batch=256, learning_rate=1e-3),
        )
    if name == "smoke":
        tiny = StageConfig(steps=4, batch=4, learning_rate=1e-4, warmup=2)
        return replace(
            base,
            pool_images=64,
            vae_images=32,
            lora_every=2,
            lora_timesteps=(50,),
            vae=tiny,
            unet=tiny,
            controlnet=tiny,
            lora=tiny,
            image_encoder=tiny,
            ip_adapter=tiny,
            evaluation=EvalConfig(
                samples=4,
                sampling_steps=3,
                test_images=4,
                loss_repeats=1,
                stride=100,
                draws=1,
                rare_pictures=8,
                probe_steps=3,
                head_steps=3,
                head_seeds=1,
            ),
        )
    raise BadRequestError(f"unknown preset {name!r}; known: cpu, gpu, smoke")


def with_lengths(config: TrainConfig, *, steps: dict[str, int], minutes: dict[str, float]) -> TrainConfig:
    """``config`` with the lengths of some stages replaced, in steps or as budgets of minutes."""
    for name in (*steps, *minutes):
        if name not in TRAINED:
            raise BadRequestError(f"stage {name!r} has no length; those that have: {', '.join(TRAINED)}")
    stages = {
        _field(name): replace(
            config.stage(name),
            steps=steps.get(name, config.stage(name).steps),
            minutes=minutes.get(name),
        )
        for name in TRAINED
    }
    return replace(config, **stages)  # type: ignore[arg-type]

"""Tiny random models in the shape of `reference`: 64 px, 16 x 16 latents, four levels, untrained, float32."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from featstore.datasets.base import Dataset, DatasetInfo, Sample, UInt8Array

WIDTHS = (8, 16, 16, 24)
TEXT_WIDTH = 16
TOKENS = 77
LORA_RANK = 4
LORA_ALPHA = 2


def build_tiny_sd(folder: Path, seed: int = 0, *, sample_size: int = 16) -> Path:
    """Write a random Stable Diffusion pipeline folder of 64 px images and return its path."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        block_out_channels=WIDTHS,
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=sample_size * 4,
        scaling_factor=0.7,
    )
    tokenizer = _tokenizer(folder / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    _enliven(unet)
    _enliven(text_encoder, scale=4.0)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    _scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def build_tiny_controlnet(folder: Path, pipeline: Path, seed: int = 1) -> Path:
    """Write a random ControlNet for the pipeline's UNet, whose residuals are not zero."""
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet", use_safetensors=True)
    torch.manual_seed(seed)
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8))
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.3)
    torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight, std=0.5)
    controlnet.save_pretrained(folder)
    return folder


def build_tiny_lora(folder: Path, pipeline: Path, seed: int = 2, *, text_encoder: bool = True) -> Path:
    """Write a random LoRA of the UNet's (and the text encoder's) attention, strong enough to be seen."""
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet", use_safetensors=True)
    text = CLIPTextModel.from_pretrained(pipeline / "text_encoder")
    torch.manual_seed(seed)
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    text_config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=["q_proj", "k_proj", "v_proj"])
    unet.add_adapter(config)
    text.add_adapter(text_config)
    for model in (unet, text):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    StableDiffusionPipeline.save_lora_weights(
        str(folder),
        unet_lora_layers=get_peft_model_state_dict(unet),
        text_encoder_lora_layers=get_peft_model_state_dict(text) if text_encoder else None,
        unet_lora_adapter_metadata=config.to_dict(),
        text_encoder_lora_adapter_metadata=text_config.to_dict() if text_encoder else None,
    )
    return folder


def build_tiny_reference(root: Path, seed: int = 0) -> Path:
    """Write a whole weights root: the tiny stand-ins of `reference`'s pipeline, ControlNet and LoRAs.

    Use it as ``weights_root`` of ``featstore.models.resolve("reference")`` or as ``$FEATSTORE_WEIGHTS``.
    """
    home = root / "reference"
    pipeline = build_tiny_sd(home / "pipeline", seed)
    build_tiny_controlnet(home / "controlnet-canny", pipeline, seed + 1)
    build_tiny_lora(home / "lora", pipeline, seed + 2)
    build_tiny_lora(home / "lora-overfit", pipeline, seed + 3)
    return root


def _enliven(model: torch.nn.Module, scale: float = 2.0) -> None:
    """Make attention less uniform than a fresh initialisation does, so that a wrong map is not the right one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight", "q_proj.weight", "k_proj.weight", "embedding.weight")):
                parameter.mul_(scale)


def _scheduler() -> PNDMScheduler:
    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _tokenizer(folder: Path, *, pad_token: str = "<|endoftext|>", reverse: bool = False) -> CLIPTokenizer:
    letters = string.ascii_lowercase + string.digits + ",."
    pieces = [*letters, *(letter + "</w>" for letter in letters), "ho", "rs", "hors", "horse</w>"]
    pieces = pieces[::-1] if reverse else pieces
    vocabulary = {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [("h", "o"), ("r", "s"), ("ho", "rs"), ("hors", "e</w>")]
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        model_max_length=TOKENS,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token=pad_token,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


class TextDataset(Dataset):
    """A data set of random pictures that is there for its texts."""

    def __init__(self, *, prompt: str | None = "a horse, high quality", captions: bool = True) -> None:
        self._prompt = prompt
        self._captions = captions

    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            name="toyhorse", title="for tests", plain_prompt="a horse", prompt=self._prompt, source="made up"
        )

    @property
    def samples(self) -> tuple[Sample, ...]:
        return tuple(Sample(key=f"{n}", digest=f"{n:064x}", split="train") for n in range(8))

    def image(self, key: str) -> UInt8Array:
        return np.random.default_rng(int(key)).integers(0, 256, (64, 64, 3), dtype=np.uint8)

    def mask(self, key: str) -> UInt8Array | None:
        return None

    def caption(self, key: str, kind: str) -> str:
        return f"a {kind} horse {key}" if self._captions else super().caption(key, kind)

    @property
    def caption_source(self) -> str | None:
        return "toyhorse/fine/1" if self._captions else None

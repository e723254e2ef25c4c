"""Tiny random models in the shapes of Stable Diffusion XL and 2.1: 64 px, 16 x 16 latents, untrained, float32.

ControlNets for both come from `tests.tiny_models.build_tiny_controlnet`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.tiny_models import LORA_ALPHA, LORA_RANK, TOKENS, _enliven, _tokenizer, build_tiny_sd

TEXT_WIDTHS = (16, 24)
POOLED_WIDTH = 20
TIME_WIDTH = 4


def build_tiny_sdxl(folder: Path, seed: int = 0) -> Path:
    """Write a random SDXL pipeline folder of 64 px images and return its path."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16, 24),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        cross_attention_dim=sum(TEXT_WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=6 * TIME_WIDTH + POOLED_WIDTH,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.9,
        force_upcast=True,
    )
    # As in SDXL, the second tokenizer pads with a token of its own.
    tokenizers = [_tokenizer(folder / "tokenizer"), _tokenizer(folder / "tokenizer_2", pad_token=".", reverse=True)]
    encoders = [
        CLIPTextModel(_text_config(tokenizers[0], TEXT_WIDTHS[0], layers=2, hidden_act="quick_gelu")),
        CLIPTextModelWithProjection(_text_config(tokenizers[1], TEXT_WIDTHS[1], layers=3, hidden_act="gelu")),
    ]
    for model, scale in ((unet, 2.0), *((encoder, 4.0) for encoder in encoders)):
        _enliven(model, scale)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    encoders[0].save_pretrained(folder / "text_encoder")
    encoders[1].save_pretrained(folder / "text_encoder_2")
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def build_tiny_sdxl_lora(folder: Path, pipeline: Path, seed: int = 2) -> Path:
    """Write a random LoRA of the attention of the UNet and of both text encoders, strong enough to be seen."""
    parts: dict[str, tuple[Any, list[str]]] = {
        "unet": (UNet2DConditionModel, ["to_q", "to_k", "to_v", "to_out.0"]),
        "text_encoder": (CLIPTextModel, ["q_proj", "k_proj", "v_proj"]),
        "text_encoder_2": (CLIPTextModelWithProjection, ["q_proj", "v_proj", "fc1"]),
    }
    torch.manual_seed(seed)
    layers: dict[str, Any] = {}
    for name, (kind, targets) in parts.items():
        model = kind.from_pretrained(pipeline / name, use_safetensors=True)
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=targets)
        model.add_adapter(config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.5)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model)
        layers[f"{name}_lora_adapter_metadata"] = config.to_dict()
    StableDiffusionXLPipeline.save_lora_weights(str(folder), **layers)
    return folder


def build_tiny_sd21(folder: Path, seed: int = 0) -> Path:
    """Write a random pipeline folder in the shape of Stable Diffusion 2.1, which predicts v, and return its path."""
    build_tiny_sd(folder, seed)
    torch.manual_seed(seed)
    config = dict(UNet2DConditionModel.load_config(folder / "unet"))
    config |= {"use_linear_projection": True, "attention_head_dim": (1, 2, 4, 6)}
    unet = UNet2DConditionModel.from_config(config)
    _enliven(unet)
    unet.save_pretrained(folder / "unet")
    scheduler = PNDMScheduler.from_pretrained(folder / "scheduler")
    scheduler.register_to_config(prediction_type="v_prediction")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def _text_config(tokenizer: CLIPTokenizer, width: int, *, layers: int, hidden_act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=POOLED_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )

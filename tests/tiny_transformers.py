"""Tiny random pipelines with a transformer: 64 px, factor 4, latents of 16 x 16, patches of 2 x 2, float32."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from tests.tiny_models import _tokenizer as build_clip_tokenizer

HEADS, HEAD_WIDTH = 2, 12
WIDTH = HEADS * HEAD_WIDTH
BLOCKS = 4
CAPTION_WIDTH, JOINT_WIDTH = 16, 32
PIXARTS: dict[str, dict[str, Any]] = {
    # As PixArt-XL-2-512x512: not told the image's size.
    "alpha": {"sample_size": 16},
    # As PixArt-XL-2-1024-MS: told, because its latents have a side of 128.
    "alpha-sized": {"sample_size": 128},
    # As PixArt-Sigma-XL-2-1024-MS.
    "sigma": {"sample_size": 128, "use_additional_conditions": False, "out_channels": 4},
}
SD3S: dict[str, dict[str, Any]] = {
    # As 3.5 medium: norms of queries and keys, a second attention in the first blocks.
    "sd3": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    # As 3 medium, saved without T5.
    "sd3-no-t5": {},
}


def build_tiny_pixart(folder: Path, kind: str = "alpha", seed: int = 0) -> Path:
    """Write a random PixArt pipeline folder of a kind in `PIXARTS` and return its path."""
    torch.manual_seed(seed)
    config = {"in_channels": 4, "out_channels": 8, "cross_attention_dim": WIDTH, "caption_channels": CAPTION_WIDTH}
    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_WIDTH, num_layers=BLOCKS, **config | PIXARTS[kind]
    )
    name = "Sigma" if kind == "sigma" else "Alpha"
    parts: dict[str, Any] = {
        "transformer": transformer,
        "vae": _vae(latent_channels=4),
        "tokenizer": _sentencepiece(folder / "tokenizer") if kind == "sigma" else _t5_tokenizer(folder / "tokenizer"),
        "scheduler": DPMSolverMultistepScheduler(
            beta_schedule="linear", beta_start=0.0001, beta_end=0.02, algorithm_type="dpmsolver++"
        ),
    }
    parts["text_encoder"] = _t5(parts["tokenizer"], CAPTION_WIDTH)
    return _save(folder, f"PixArt{name}Pipeline", parts)


def build_tiny_sd3(folder: Path, kind: str = "sd3", seed: int = 0) -> Path:
    """Write a random Stable Diffusion 3 pipeline folder of a kind in `SD3S` and return its path."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        num_layers=BLOCKS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        joint_attention_dim=JOINT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=16 + 12,
        pos_embed_max_size=24,
        **SD3S[kind],
    )
    parts: dict[str, Any] = {
        "transformer": transformer,
        "vae": _vae(latent_channels=8, shift_factor=0.3, use_quant_conv=False, use_post_quant_conv=False),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    for name, width, projection in (("", 16, 16), ("_2", 8, 12)):
        tokenizer = build_clip_tokenizer(folder / f"tokenizer{name}")
        parts[f"tokenizer{name}"] = tokenizer
        parts[f"text_encoder{name}"] = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=32,
                projection_dim=projection,
                num_hidden_layers=3,
                num_attention_heads=2,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    parts["tokenizer_3"] = _t5_tokenizer(folder / "tokenizer_3") if kind == "sd3" else None
    parts["text_encoder_3"] = _t5(parts["tokenizer_3"], JOINT_WIDTH) if kind == "sd3" else None
    return _save(folder, "StableDiffusion3Pipeline", parts)


def build_tiny_sd3_lora(folder: Path, pipeline: Path, seed: int = 3) -> Path:
    """Write a random LoRA of the transformer's and the second text encoder's attention, strong enough to be seen."""
    transformer = SD3Transformer2DModel.from_pretrained(pipeline / "transformer", use_safetensors=True)
    text = CLIPTextModelWithProjection.from_pretrained(pipeline / "text_encoder_2")
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_k", "add_k_proj", "ff.net.2"])
    text_config = LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "v_proj"])
    transformer.add_adapter(config)
    text.add_adapter(text_config)
    for model in (transformer, text):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    StableDiffusion3Pipeline.save_lora_weights(
        str(folder),
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        text_encoder_2_lora_layers=get_peft_model_state_dict(text),
        transformer_lora_adapter_metadata=config.to_dict(),
        text_encoder_2_lora_adapter_metadata=text_config.to_dict(),
    )
    return folder


def _save(folder: Path, pipeline: str, parts: dict[str, Any]) -> Path:
    index: dict[str, Any] = {"_class_name": pipeline}
    for name, part in parts.items():
        if part is None:
            index[name] = [None, None]
            continue
        library = "transformers" if name.startswith("t") and name != "transformer" else "diffusers"
        index[name] = [library, type(part).__name__]
        if not name.startswith("tokenizer"):
            _enliven(part)
            part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def _enliven(part: Any) -> None:
    """Make attention less uniform and norms less neutral than a fresh initialisation, so that a slip shows."""
    if not isinstance(part, torch.nn.Module):
        return
    with torch.no_grad():
        for name, parameter in part.named_parameters():
            if "attn" in name and "norm_" in name:
                parameter.uniform_(0.5, 2.0)
            elif name.endswith(("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")):
                parameter.mul_(4.0)
            elif name.endswith(("q_proj.weight", "k_proj.weight", "shared.weight", "embedding.weight")):
                parameter.mul_(2.0)


def _vae(**config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.7,
        **config,
    )


def _t5(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def _t5_tokenizer(folder: Path) -> T5Tokenizer:
    """Pieces of a letter, and a few longer ones, in a ``tokenizer.json``."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.ABCDEFGH"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -4.0) for letter in letters)]
    pieces += [("▁horse", -3.0), ("▁a", -2.5), ("se", -3.5)]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _sentencepiece(folder: Path) -> T5Tokenizer:
    """A SentencePiece model alone, which is all that the published PixArt folders have."""
    folder.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a horse, high quality", "a fine horse on a meadow 0123456789", "x y z ."] * 20),
        model_writer=model,
        vocab_size=48,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 100}), encoding="utf-8"
    )
    return T5Tokenizer.from_pretrained(folder)

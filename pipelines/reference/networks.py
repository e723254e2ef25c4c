"""The untrained networks, all of them stock diffusers and transformers classes."""

from __future__ import annotations

from diffusers import AutoencoderKL, ControlNetModel, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from featstore.pipelines.reference.config import ModelConfig
from featstore.pipelines.reference.tokens import LENGTH


def build_vae(config: ModelConfig) -> AutoencoderKL:
    """The autoencoder: RGB in [-1, 1] at 64 px to four latent channels at 16 px."""
    levels = len(config.vae_widths)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.vae_widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=config.groups,
        sample_size=config.image_px,
        scaling_factor=1.0,
        force_upcast=False,
    )


def build_unet(config: ModelConfig) -> UNet2DConditionModel:
    """The denoiser, with Stable Diffusion 1.5's blocks and names."""
    return UNet2DConditionModel(
        sample_size=config.latent_px,
        in_channels=4,
        out_channels=4,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        block_out_channels=config.unet_widths,
        layers_per_block=2,
        cross_attention_dim=config.text_width,
        attention_head_dim=config.heads,
        norm_num_groups=config.groups,
    )


def build_text_encoder(config: ModelConfig, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text model, trained together with the denoiser."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=3 * config.text_width,
            projection_dim=config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.heads,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_image_encoder(config: ModelConfig) -> CLIPVisionModelWithProjection:
    """A small CLIP vision model of (B, 3, 64, 64) pixels, normalised as CLIP does it."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=config.vision_width,
            intermediate_size=3 * config.vision_width,
            projection_dim=config.vision_width,
            num_hidden_layers=config.vision_layers,
            num_attention_heads=config.heads,
            image_size=config.image_px,
            patch_size=config.vision_patch_px,
        )
    )


def build_controlnet(config: ModelConfig, unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet that starts as a copy of the denoiser's encoder; its hint is a (B, 3, 64, 64) image."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=config.hint_widths)


def build_scheduler() -> PNDMScheduler:
    """Stable Diffusion 1.5's schedule."""
    scheduler = PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.register_to_config(clip_sample=False)  # read by schedulers made from this one's config
    return scheduler
